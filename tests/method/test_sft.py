"""SFT in the order of sft.py: the equation, the mask, a few steps of training by hand, samples.

tests/system/test_loop.py tests what all scripts share: the optimizer step, dtypes, processes.
"""
import functools
import itertools
import math

import by_hand
import pytest
import torch
from by_hand import ask, close, say
from conftest import run_args

import common
import sft

CHAT = ask("What is 1 + 1?") + say("1 + 1 = 2")
LONG = [{"role": "system", "content": "Be brief."}, *CHAT, *ask("And 2 + 2?"), *say("4")]


@pytest.fixture
def tokenizer():
    """The tokenizer of tiny/chat, whose eos token ends a turn and is not the pad token."""
    return common.load_tokenizer("tiny/chat")


# ---- the equation --------------------------------------------------------------------------------

def test_the_worked_example():
    """Each number of the docstring, computed by the script's functions."""
    logps = torch.tensor([[0.5, 0.8, 0.1, 0.1], [0.25, 0.5, 0.5, 0.8]]).log()
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    sums = [sft.sft_loss(logps[i:i + 1], mask[i:i + 1], 1).item() for i in range(2)]
    loss = sft.sft_loss(logps, mask, 6).item()
    by_hand.documented(
        sft, ("= {:.3f} for the first", sums[0]), ("0.223 = {:.3f} loss", sums[1]),
        ("/ 6 = {:.3f}", loss), ("e^0.652 = {:.3f}", math.exp(loss)),
        ("would be {:.3f}", (sums[0] / 2 + sums[1] / 4) / 2))
    parts = [sft.sft_loss(logps[i:i + 1], mask[i:i + 1], 6) for i in range(2)]
    close(sum(parts), loss, "sum of two micro-batches: is N counted over the step?")


def test_the_gradient_is_minus_one_over_n_where_the_mask_is_one():
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])  # the first token is never predicted
    assert torch.autograd.gradcheck(lambda x: sft.sft_loss(x, mask, 4), (logps,))
    sft.sft_loss(logps, mask, 4).backward()
    expected = torch.tensor([[0, -0.25, -0.25], [-0.25, 0, -0.25]], dtype=torch.float64)
    assert torch.equal(logps.grad, expected), f"{logps.grad}: is the mask shifted by one?"


# ---- the mask ------------------------------------------------------------------------------------

def trained_text(tokenizer, tokens):
    mask = torch.tensor(tokens["loss_mask"]) == 1
    return tokenizer.decode(torch.tensor(tokens["input_ids"])[mask])


@pytest.mark.parametrize("row, prompt, trained", [
    ({"messages": CHAT}, "assistant\n", "1 + 1 = 2<|im_end|>"),
    ({"messages": LONG}, "assistant\n", "1 + 1 = 2<|im_end|>4<|im_end|>"),
    ({"prompt": LONG[:4], "completion": LONG[4:]}, "assistant\n", "4<|im_end|>"),
    ({"prompt": "1 + 1", "completion": " = 2"}, "1 + 1", " = 2<|im_end|>"),
    ({"question": "1 + 1?", "answer": "2"}, "<|im_start|>assistant\n", "2<|im_end|>"),
    ({"text": "1 + 1 = 2"}, "1 + ", " + 1 = 2<|im_end|>"),
    ({"text": "1 + 1 = 2<|im_end|>"}, "1 + ", " + 1 = 2<|im_end|>"),
])
def test_only_answers_and_the_tokens_that_end_them_are_trained(tokenizer, row, prompt, trained):
    """Samples continue the text before the first answer, or the first quarter of a plain text."""
    [example] = sft.encode_conversation(row, tokenizer, 512)
    tokens = example["tokens"]
    assert trained_text(tokenizer, tokens) == trained
    assert tokenizer.decode(example["prompt"]).endswith(prompt)
    assert tokens["input_ids"][:len(example["prompt"])] == example["prompt"]


def test_the_end_of_a_turn_is_trained_and_padding_is_not_where_both_are_one_token():
    """A mask `id != pad_token_id` would drop the end, and the model would not learn to stop."""
    tokenizer = common.load_tokenizer("tiny/base")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [sft.encode_conversation({"messages": chat}, tokenizer, 512)[0] for chat in (LONG, CHAT)]
    batch = sft.collate([row["tokens"] for row in rows], tokenizer.pad_token_id, "cpu")
    end, mask = tokenizer.eos_token, batch["loss_mask"] == 1
    trained = [tokenizer.decode(batch["input_ids"][i][mask[i]]) for i in range(2)]
    assert trained == [f"1 + 1 = 2{end}4{end}", f"1 + 1 = 2{end}"]
    assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in rows]
    other = sft.collate([row["tokens"] for row in rows], 7, "cpu")
    for name in ("loss_mask", "attention_mask"):
        assert torch.equal(other[name], batch[name]), f"{name} must be 0 on padding, not the pad id"


def test_a_template_that_drops_old_thoughts_gives_one_example_per_answer(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "(message.content if loop.last else message.content.split('>')[-1])")
    turn = ask("1 + 1?") + say("<hm>2")
    first, second = sft.encode_conversation({"messages": turn + turn}, tokenizer, 512)
    for example in first, second:
        assert trained_text(tokenizer, example["tokens"]) == "<hm>2<|im_end|>"
    assert len(first["prompt"]) < len(second["prompt"])
    assert "hm" not in tokenizer.decode(second["prompt"])


@pytest.mark.parametrize("row", [{"messages": LONG}, {"text": "1 + 1 = 2 and 2 + 2 = 4"},
                                 {"prompt": "1 + 1 = 2 and 2 + 2", "completion": " = 4"}])
def test_truncation_keeps_the_head_the_end_of_the_prompt_and_something_to_train(tokenizer, row):
    """The middle of the prompt is cut first, and the end of the answer only after that."""
    [whole] = [x["tokens"] for x in sft.encode_conversation(row, tokenizer, 512)]
    size, start = len(whole["input_ids"]), whole["loss_mask"].index(1)
    head = len(common.encode(tokenizer, *sft.prompt_and_answer(row, tokenizer))[0][0][0])
    for max_length in range(2 * head + 4, size + 2):
        [example] = sft.encode_conversation(row, tokenizer, max_length)
        tokens, first = example["tokens"], example["tokens"]["loss_mask"].index(1)
        assert example["length"] == min(size, max_length) and first > 0
        assert example["truncated"] == (size > max_length)
        cut = start - first  # tokens that the prompt lost
        for name, ids in tokens.items():
            assert ids == (whole[name][:head] + whole[name][head + cut:])[:example["length"]], name
        room = max(max_length // 2, head + max_length // 4)
        assert cut == 0 or first >= room, "the prompt is cut although the answer could be"
        assert cut + example["length"] == size or first <= room, "the answer is cut too early"


# ---- NEFTune -------------------------------------------------------------------------------------

def test_neftune_noise_is_uniform_within_its_bound_and_off_in_evaluation(tokenizer):
    """The bound is ±α/√(n·D) for a row of n tokens, some of which may equal the pad token."""
    model, lengths = common.load_model("tiny/chat", trainable=False), (60, 20, 40)
    rows = [{"input_ids": [5 * n] * n, "attention_mask": [1] * n, "loss_mask": [0, 1] * (n // 2)}
            for n in lengths]
    batch = sft.collate(rows, 100, "cpu")  # every token of the second row is equal to the pad
    plain, seen = model.get_input_embeddings()(batch["input_ids"]), []
    hook = functools.partial(sft.add_noise, 5.0)
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    model.base_model.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0] - plain))
    for training in False, True, True:
        sft.token_logps(model.train(training), batch)
    silent, noise, other = seen
    assert not silent.any() and not torch.equal(noise, other)
    for row, length in zip(noise, lengths, strict=True):
        share = row[:length] * math.sqrt(length * plain.shape[-1]) / 5  # uniform from −1 to 1
        assert 0.98 < share.abs().max() < 1.0001, "is n the padded length?"
        assert abs(share.abs().mean() - 0.5) < 0.03 and abs(share.mean()) < 0.04, "uniform?"
        assert len(share.unique()) > 0.9 * share.numel()  # each element is drawn on its own


def test_noise_depends_on_step_and_process_and_not_on_evaluations(
        tmp_path, write_jsonl, monkeypatch):
    """If two processes drew the same noise, training would see only half as many draws."""
    rows = [{"messages": ask(f"Add {i} and 3.") + say(f"{i + 3}")} for i in range(8)]
    seeds, add_noise = [], sft.add_noise

    def seen(alpha, base, inputs, kwargs):
        if base.training:
            seeds.append(torch.initial_seed())
        assert alpha == 5
        return add_noise(alpha, base, inputs, kwargs)

    monkeypatch.setattr(sft, "add_noise", seen)
    monkeypatch.setattr(common, "WORLD", 2)
    for every, rank in itertools.product((0, 1), (0, 1)):
        monkeypatch.setattr(common, "RANK", rank)
        sft.train(run_args(
            sft, dataset=write_jsonl(rows[:4]), eval_dataset=write_jsonl(rows[4:], "held.jsonl"),
            eval_every=every, neftune_alpha=5, batch_size=4, max_steps=2, max_new_tokens=1,
            output_dir=tmp_path / f"{every}{rank}"))
    assert len(set(seeds)) == 4, f"two steps in two processes have seeds {seeds}"
    assert seeds[:4] == seeds[4:], "an evaluation changes the noise, or leaves eval mode on"


# ---- a few steps of training by hand -------------------------------------------------------------

def conversation(i):
    chat = ask(f"Add {i}" + " and 1" * (i % 4)) + say(f"{i} + {i % 4}" + " = 7" * (i % 3))
    return chat + (ask("And 3?") + say("3") if i % 2 else [])


def loss_by_hand(model, chats):
    """−Σ log π / N, computed one assistant turn at a time, and N."""
    logps = []
    for chat in chats:
        for turn in range(1, len(chat), 2):
            prompt = by_hand.prompt_ids(chat[:turn])
            answer = by_hand.answer_ids(chat[turn]["content"])
            logps.append(by_hand.logps(model, prompt, answer))
    return -torch.cat(logps).mean(), sum(map(len, logps))


@pytest.mark.parametrize("rank", [16, 0])
def test_training_is_what_it_is_by_hand(rank, tmp_path):
    """Checks each logged figure, each weight and the samples, for LoRA and full fine-tuning."""
    chats, held_out = [conversation(i) for i in range(9)], [conversation(i) for i in range(20, 25)]
    said = [[[5, 2], [6, 7, 2], [8], [4], [2]],
            [[9, 2], [5, 5, 2], [7], [6, 2], [8]]]  # before and after; token 2 ends an answer
    asked = []

    def sample_answers(model, tokenizer, prompts, length, seed):
        asked.append(prompts)
        return said[len(asked) - 1]

    run = by_hand.Run(
        sft, tmp_path, [{"messages": x} for x in chats], [{"messages": x} for x in held_out],
        watch=["batch_loss"], replace={"sample_answers": sample_answers}, model="tiny/chat",
        epochs=1, micro_batch_size=3, lora_rank=rank)
    hand = by_hand.Training(run)
    loss, _ = loss_by_hand(hand.model, held_out)
    close(run.summary["before"], {"loss": loss, "perplexity": loss.exp()}, "held out, before")
    of_ids = {str(by_hand.prompt_ids(x[:-1]) + by_hand.answer_ids(x[-1]["content"])): x
              for x in chats}
    for batch in run.batches("batch_loss"):
        batch = [of_ids[str(example["tokens"]["input_ids"])] for example in batch]
        loss, count = loss_by_hand(hand.model, batch)
        hand.log(hand.update(loss) | {"trained_tokens": count})
    hand.check(run)
    loss, _ = loss_by_hand(hand.model, held_out)
    expected = {"loss": loss, "perplexity": loss.exp(), "stopped": 3 / 5}
    close(run.summary["after"], expected, "held out, after")

    prompts = [by_hand.prompt_ids(chat[:1]) for chat in held_out]
    assert asked == [prompts, prompts]
    decode = by_hand.tokenizer().decode
    assert run.summary["samples"] == [
        {"prompt": decode(prompt), "before": decode(old), "after": decode(new)}
        for prompt, old, new in zip(prompts, *said, strict=True)][:3]


def test_an_answer_has_stopped_if_its_last_token_is_any_stop_token():
    answers = [[5, 6, 2], [5, 6, 7], [9], [5, 2, 7]]
    close(sft.share_stopped(answers, [2, 9]), 0.5, "share of answers that end with a stop token")
