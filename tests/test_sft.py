import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import pytest
import sft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CHAT = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "1 + 1 = 2"}]
LONG = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "4"}]
# writes the thinking of the last turn only, as Qwen3's template does
REWRITING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
             "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def small_model(tied=False, train_head=False):
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         tie_word_embeddings=tied, initializer_range=0.5)  # large weights, so that a leak of attention would show
    model = Qwen2ForCausalLM(config).double()
    model.get_output_embeddings().weight.requires_grad_(train_head)
    return model


def examples(lengths=(9, 4, 7, 5), prompt=2):
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 41, (n,)).tolist(), "loss_mask": [0] * prompt + [1] * (n - prompt)} for n in lengths]


def trained_tokens(rows):
    return sum(sum(example["loss_mask"]) for example in rows)


def loss_and_gradients(model, batches, count, packing=False):
    model.zero_grad()
    total = 0.0
    for rows in batches:
        batch = sft.collate(rows, 0, packing, "cpu")
        loss = sft.sft_loss(sft.token_logps(model, **batch)[0], batch["loss_mask"], count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-9):
    assert one[0] == pytest.approx(other[0], abs=tolerance) and one[1].keys() == other[1].keys()
    assert max((one[1][name] - other[1][name]).abs().max().item() for name in one[1]) < tolerance
    assert max(g.abs().max().item() for g in one[1].values()) > 1e-3


def tiny_args(tmp_path, **kwargs):
    args = sft.Args(**{"output_dir": str(tmp_path / "run"), "max_steps": 6, "eval_size": 4, "sample_size": 4, "max_new_tokens": 12} | kwargs)
    return args


# ---- the loss ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_loss_and_gradients_equal_those_of_transformers(tied, train_head):
    """The same labels give the same loss and gradients in transformers, with a frozen head and with a trained one."""
    model, rows = small_model(tied, train_head), [[example] for example in examples()]
    ours = loss_and_gradients(model, [rows], trained_tokens(examples()))
    batch = sft.collate(rows, 0, False, "cpu")
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    theirs = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(ours, theirs, tolerance=1e-6)  # transformers takes the log-softmax in fp32


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_trained_head_gradients_equal_those_of_the_whole_logits(chunk):
    torch.manual_seed(0)
    hidden, head = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    targets, weights = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    ours = torch.autograd.grad((sft.trainable_head_logps(hidden, head, targets, chunk) * weights).sum(), (hidden, head))
    logps = (hidden @ head.T).log_softmax(-1)[torch.arange(7), targets]
    naive = torch.autograd.grad((logps * weights).sum(), (hidden, head))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, naive))


def test_four_micro_batches_of_one_equal_one_of_four():
    model, rows = small_model(), [[example] for example in examples()]
    count = trained_tokens(examples())
    assert_same(loss_and_gradients(model, [[row] for row in rows], count), loss_and_gradients(model, [rows], count))


def test_the_mean_is_over_tokens_not_over_conversations():
    logps, mask = torch.tensor([[-1.0, -1.0, -1.0], [-5.0, 0.0, 0.0]]), torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    assert sft.sft_loss(logps, mask, 4).item() == pytest.approx(2.0)  # by conversations it would be 3


def test_gradient_is_zero_where_the_mask_is_and_nowhere_else():
    """Also the token at which a turn ends gets a gradient, although it is the pad token."""
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/base"))
    example = sft.encode({"messages": LONG}, tokenizer, 512)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and example["input_ids"].count(tokenizer.eos_token_id) == 2
    batch = sft.collate([[example], [sft.encode({"messages": CHAT}, tokenizer, 512)]], tokenizer.pad_token_id, False, "cpu")
    logps = torch.randn(batch["loss_mask"][:, 1:].shape, requires_grad=True)
    sft.sft_loss(logps, batch["loss_mask"], 7).backward()
    assert torch.equal(logps.grad, -batch["loss_mask"][:, 1:] / 7)
    ends = batch["input_ids"][0, 1:] == tokenizer.eos_token_id
    assert ends[:len(example["input_ids"]) - 1].sum() == 2 and (logps.grad[0][ends][:2] != 0).all()


def test_other_tokens_behind_the_mask_change_nothing():
    model, rows = small_model(), examples()
    rows[0]["loss_mask"][6:] = [0, 0, 0]
    before = loss_and_gradients(model, [[[rows[0]]]], 4)
    rows[0]["input_ids"][6:] = [(i + 1) % 41 for i in rows[0]["input_ids"][6:]]
    assert_same(before, loss_and_gradients(model, [[[rows[0]]]], 4), tolerance=1e-12)


# ---- packing and noise ------------------------------------------------------------------------------------

@pytest.mark.parametrize("row_length", [9, 13, 16, 100])
@pytest.mark.parametrize("train_head", [False, True])
def test_packing_changes_neither_loss_nor_gradient(row_length, train_head):
    model, count = small_model(train_head=train_head), trained_tokens(examples())
    packed, plain = sft.pack(examples(), row_length, True), sft.pack(examples(), row_length, False)
    assert len(packed) < len(plain) == 4 or row_length == 9
    assert_same(loss_and_gradients(model, [packed], count, packing=True), loss_and_gradients(model, [plain], count))


def test_packed_rows_hold_every_conversation_once_and_positions_restart():
    rows = sft.pack(examples(), 13, True)
    assert sorted(e["input_ids"] for row in rows for e in row) == sorted(e["input_ids"] for e in examples())
    assert all(sum(len(e["input_ids"]) for e in row) <= 13 for row in rows)
    batch = sft.collate(rows, 0, True, "cpu")
    assert batch["attention_mask"] is None and batch["position_ids"].tolist() == [[*range(9), *range(4)], [*range(7), *range(5), 0]]
    assert batch["lengths"].tolist() == [[9] * 9 + [4] * 4, [7] * 7 + [5] * 5 + [0]]


def test_no_packed_conversation_sees_another():
    model, (one, two, three, _) = small_model(), examples()
    def second(first):
        batch = sft.collate([[first, two]], 0, True, "cpu")
        return sft.token_logps(model, **batch)[0][0, len(first["input_ids"]) - 1:]
    assert torch.equal(second(one), second(one | {"input_ids": [i // 2 for i in one["input_ids"]]}))
    batch = sft.collate([[two]], 0, False, "cpu")
    assert torch.allclose(second(three)[1:], sft.token_logps(model, **batch)[0][0], atol=1e-10)


def test_a_model_that_mixes_packed_conversations_is_refused(refused, monkeypatch):
    model = small_model()
    sft.check_packing(model)
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda position_ids=None, **kwargs: forward(**kwargs))
    assert "--no-packing" in refused(sft.check_packing, model)


def test_neftune_noise_is_bounded_spares_padding_and_is_off_in_evaluation(monkeypatch):
    model, seen = small_model(), []
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: seen.append(kwargs["inputs_embeds"]) or forward(**kwargs))
    batch = sft.collate(sft.pack(examples(), 13, True), 0, True, "cpu")
    for training, alpha in ((True, 0.0), (True, 5.0), (False, 5.0)):
        sft.token_logps(model.train(training), **batch, neftune_alpha=alpha)
    plain, noisy, evaluated = seen
    bound = torch.where(batch["lengths"] > 0, 5 / (batch["lengths"] * 16).sqrt(), 0.0)[..., None]  # [B, T, 1]
    assert torch.equal(plain, evaluated) and ((noisy - plain).abs() <= bound).all()
    assert ((noisy - plain)[batch["lengths"] > 0].abs() > 0).all()
    noise = ((noisy - plain) / bound.clamp(min=1e-9))[batch["lengths"] > 0]  # uniform from −1 to 1
    assert noise.abs().mean().item() == pytest.approx(0.5, abs=0.05) and noise.mean().item() == pytest.approx(0.0, abs=0.1)


def test_padding_is_known_by_length_not_by_its_id():
    """Pad may be eos, which ends an answer in the middle of a conversation."""
    rows = [[{"input_ids": [5, 0, 6, 0], "loss_mask": [0, 1, 0, 1]}], [{"input_ids": [5, 6], "loss_mask": [0, 1]}]]
    assert sft.collate(rows, 0, False, "cpu")["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_held_out_figures_weigh_all_trained_tokens_alike(packing):
    """Micro-batches of very unequal rows: loss and accuracy are those of the plain logits over all trained tokens."""
    model, held_out = small_model().eval(), [{"input_ids": [*range(2, n + 2)], "loss_mask": [0] + [1] * (n - 1)} for n in (2, 30, 5)]
    loss, right = 0.0, []
    for example in held_out:
        logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        example["input_ids"][1:4] = [logits[0].argmax().item(), *example["input_ids"][2:4]]  # or nothing would be predicted right
        ids = torch.tensor(example["input_ids"])
        logits = model(ids[None]).logits[0, :-1]
        loss -= logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()
        right += (logits.argmax(-1) == ids[1:]).tolist()
    figures = sft.evaluate(model.train(), held_out, SimpleNamespace(packing=packing, micro_batch_size=1, neftune_alpha=5.0), 30, 0, 0, 1)  # without noise
    assert 3 <= sum(right) < len(right) and figures["accuracy"] == pytest.approx(sum(right) / len(right))
    assert figures["loss"] == pytest.approx(loss / len(right)) and figures["perplexity"] == pytest.approx(math.exp(loss / len(right)))


# ---- data -------------------------------------------------------------------------------------------------

def trained_text(tokenizer, example):
    return tokenizer.decode([i for i, m in zip(example["input_ids"], example["loss_mask"]) if m])


def tiny_tokenizer():
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


@pytest.mark.parametrize("row, text", [
    ({"messages": LONG}, "1 + 1 = 2<|im_end|>4<|im_end|>"),
    ({"prompt": LONG[:4], "completion": LONG[4:]}, "4<|im_end|>"),
    ({"prompt": "1 + 1", "completion": " = 2"}, " = 2<|im_end|>"),
    ({"prompt": "1 + 1", "completion": " = 2<|im_end|>"}, " = 2<|im_end|>"),
    ({"instruction": "Add.", "input": "1 and 1", "output": "2"}, "2<|im_end|>"),
    ({"instruction": "Add 1 and 1.", "input": None, "output": "2"}, "2<|im_end|>"),
    ({"text": "1 + 1 = 2"}, " + 1 = 2<|im_end|>"),
])
def test_only_what_the_model_shall_say_is_trained(row, text):
    tokenizer = tiny_tokenizer()
    assert trained_text(tokenizer, sft.encode(row, tokenizer, 512)) == text


def test_alpaca_rows_are_plain_text_without_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    example = sft.encode({"instruction": "Add.", "input": "1 and 1", "output": "2"}, tokenizer, 512)
    assert tokenizer.decode(example["input_ids"]) == "Add.\n\n1 and 1\n\n2<|im_end|>"


@pytest.mark.parametrize("row", [
    {"messages": LONG[:2]}, {"messages": "text"}, {"prompt": "a", "completion": CHAT}, {"prompt": "a", "completion": ""},
    {"text": ["a"]}, {"text": ""}, {"instruction": 3, "output": "a"}, {"instruction": "a", "output": ["a"]},
])
def test_unusable_rows_raise(row):
    with pytest.raises(ValueError):
        sft.encode(row, tiny_tokenizer(), 512)


@pytest.mark.parametrize("max_length", range(2, 60))
def test_cutting_never_leaves_nothing_to_train(max_length):
    tokenizer = tiny_tokenizer()
    whole, example = (sft.encode({"messages": LONG}, tokenizer, length) for length in (512, max_length))
    if example is not None:
        assert len(example["input_ids"]) == len(example["loss_mask"]) <= max_length and 1 in example["loss_mask"][1:]
        assert example["cut"] == (len(whole["input_ids"]) > max_length)
        start = whole["loss_mask"].index(1)  # the prompt keeps its end: all of it, or half of max_length, or what the answers leave free
        kept = max(min(start, max_length // 2), start - max(0, len(whole["input_ids"]) - max_length))
        assert example["loss_mask"].index(1) == kept and example["input_ids"][:kept] == whole["input_ids"][start - kept:start]


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "SmolLM2-135M-Instruct"])
def test_real_templates_are_masked(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    example = sft.encode({"messages": LONG}, tokenizer, 512)
    assert trained_text(tokenizer, example) == "1 + 1 = 2<|im_end|>4<|im_end|>"
    assert "system" in tokenizer.decode(sft.encode({"messages": CHAT}, tokenizer, 512)["prompt"])  # both write a default system turn


def test_a_template_that_drops_past_thinking_is_masked_where_it_can_be_and_else_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REWRITING
    think = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>2"}]
    assert trained_text(tokenizer, sft.encode({"messages": think}, tokenizer, 512)) == "<think>hm</think>2<|im_end|>"
    assert trained_text(tokenizer, sft.encode({"prompt": think + LONG[3:4], "completion": LONG[4:]}, tokenizer, 512)) == "4<|im_end|>"
    with pytest.raises(ValueError, match="rewrites message 2"):
        sft.encode({"messages": think + LONG[3:]}, tokenizer, 512)


# ---- runs -------------------------------------------------------------------------------------------------

def test_bad_input_ends_in_one_line_before_the_model_is_loaded(tmp_path, write_jsonl, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    good = [{"messages": [{"role": "user", "content": str(i)}, CHAT[1]]} for i in range(10)]
    cases = [
        ([{"question": "a", "answer": "b"}], {}, "question, answer: wanted are messages, or prompt and completion, or instruction and output, or text"),
        ([*good, {"messages": None}], {}, "row 11: it has no messages"),
        ([{"messages": [CHAT[1]]}], {}, "roles out of order"),
        ([{"messages": [CHAT[0]]}], {}, "no assistant turn"),
        ([], {}, "is empty"),
        (good[:1], {}, "too few different prompts"),
        (good, {"max_length": 8}, "no row is left"),
        (good, {"neftune_alpha": -1.0}, "--neftune-alpha"),
        (good, {"lora_rank": -1}, "--lora-rank"),
        (good, {"batch_size": 0}, "--batch-size"),
        (good, {"eval_dataset": str(tmp_path / "rows.jsonl")}, "is also what is trained on"),
    ]
    for rows, flags, message in cases:
        assert message in refused(sft.train, tiny_args(tmp_path, dataset=write_jsonl(rows), **flags))
    assert "cannot be read" in refused(sft.train, tiny_args(tmp_path, dataset="none.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [{"neftune_alpha": 5.0}, {"lora_rank": 0, "packing": False}], ids=["lora with noise", "full without packing"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    """Killed in step 5, after the state of step 4 was saved; full weights and noise are as repeatable as LoRA alone."""
    whole, killed = (tiny_args(tmp_path, output_dir=str(tmp_path / name), save_every=2, **flags) for name in ("whole", "killed"))
    sft.train(whole)

    calls, loss = iter(range(100)), sft.sft_loss
    def dying(*args):
        if torch.is_grad_enabled() and next(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(sft, "sft_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        sft.train(killed)
    monkeypatch.setattr(sft, "sft_loss", loss)
    assert not (tmp_path / "killed/summary.json").exists()
    monkeypatch.setattr("sys.argv", ["sft.py", "--resume", str(tmp_path / "killed")])
    sft.train(sft.parse_args(sft.Args, sft.__doc__))

    file = "model.safetensors" if whole.lora_rank == 0 else "adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, open(tmp_path / name / "metrics.jsonl"))]
              for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["before"] == summaries[1]["before"] and summaries[0]["after"] == summaries[1]["after"]


def test_a_run_leaves_everything_behind_and_dpo_can_go_on_from_it(tmp_path, capsys):
    args = tiny_args(tmp_path, max_steps=3)
    sft.train(args)
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"model", "dataset", "seconds", "tokens_per_second", "peak_memory_gib", "device", "dtype"} <= summary.keys()
    assert summary["method"] == "sft" and summary["steps"] == 3
    assert summary["before"].keys() == summary["after"].keys() == {"loss", "perplexity", "accuracy", "stopped"}
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["after"]["perplexity"] == pytest.approx(math.exp(summary["after"]["loss"]))
    rates = [json.loads(line)["learning_rate"] for line in open(folder / "metrics.jsonl")]
    assert rates == pytest.approx([args.learning_rate * min((n + 1) / (round(0.1 * 3) + 1), 0.5 + 0.5 * math.cos(math.pi * n / 3)) for n in range(3)])
    for line in map(json.loads, open(folder / "metrics.jsonl")):
        assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"] and 0 <= line["accuracy"] <= 1
    # the saved tokenizer ends answers with the same token as the one that was trained with
    start, saved = common.load_tokenizer(str(ROOT / "tiny/base")), common.load_tokenizer(str(folder))
    assert common.encode_chat(start, LONG) == common.encode_chat(saved, LONG) and saved.eos_token_id in common.encode_chat(saved, LONG)[0]
    # dpo.py's start: policy and reference are the same model, so every log-ratio is exactly 0 and the loss log 2
    model = common.load_model(str(folder)).eval()
    batch = sft.collate([[sft.encode({"messages": CHAT}, saved, 512)]], 0, False, "cpu")
    with torch.no_grad():
        logps = sft.token_logps(model, **batch)[0]
        with common.reference(model):
            assert torch.equal(logps, sft.token_logps(model, **batch)[0])
        with model.disable_adapter():
            assert not torch.equal(logps, sft.token_logps(model, **batch)[0])
    capsys.readouterr()


def test_an_answer_that_ends_at_the_limit_by_itself_has_stopped(monkeypatch):
    model, tokenizer = common.load_model("tiny/chat", trainable=False), tiny_tokenizer()
    monkeypatch.setattr(sft, "sample", lambda *args: [[5, 6, tokenizer.eos_token_id], [5, 6, 7], [tokenizer.eos_token_id], [5, 6, 7]])
    assert sft.sample_answers_and_stops(model, tokenizer, [[1]] * 4, SimpleNamespace(max_new_tokens=3, seed=0))[1] == 0.5


@pytest.mark.parametrize("extra", [{"output": "9"}, {"completion": "9"}, {"prompt": "9"}])
def test_a_column_that_half_belongs_to_another_format_is_ignored(extra, tmp_path, write_jsonl):
    rows = [{"text": f"{i} + {i} = {2 * i}", "messages": None} | extra for i in range(10)]
    sft.train(tiny_args(tmp_path, dataset=write_jsonl(rows), max_steps=1, sample_size=1))
    assert (tmp_path / "run/summary.json").exists()


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_tokens_and_is_clipped(tmp_path):
    """Eight conversations, packed and in micro-batches: loss and gradient norm of a step are those of one batch. Clipped to next to nothing, nothing moves."""
    args = tiny_args(tmp_path, max_steps=1, batch_size=8, micro_batch_size=1)
    sft.train(args)
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    torch.manual_seed(0)
    model, tokenizer = common.load_model("tiny/base"), common.load_tokenizer("tiny/base")
    rows = sft.load_rows("tiny/data/sft_train.jsonl", "train", 0, 0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:8]
    window = [sft.encode(rows[i], tokenizer, 128) for i in order]
    batch = sft.collate([[example] for example in window], tokenizer.pad_token_id, False, "cpu")
    logps, accuracy = sft.token_logps(model, **batch)
    loss = -logps.sum() / trained_tokens(window)
    assert logged["accuracy"] == pytest.approx(accuracy.item(), abs=0.1)  # the mean over rows, and that over tokens
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4) and logged["grad_norm"] == pytest.approx(norm, rel=1e-4)

    sft.train(tiny_args(tmp_path, max_steps=1, max_grad_norm=1e-9, learning_rate=1e-2, warmup_ratio=0.0, output_dir=str(tmp_path / "clipped")))
    moved = [w.abs().max().item() for name, w in load_file(tmp_path / "clipped/adapter_model.safetensors").items() if "lora_B" in name]
    assert 0 < max(moved) < 2e-3  # Adam divides by |g| + 1e-8


def test_full_fine_tuning_saves_a_plain_model(tmp_path):
    sft.train(tiny_args(tmp_path, lora_rank=0, max_steps=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/base", dtype=torch.float32)
    changed = [name for (name, p), q in zip(model.named_parameters(), base.parameters()) if not torch.equal(p.float(), q)]
    assert model.dtype == torch.float32 and len(changed) == len(list(model.parameters()))


def test_the_held_out_loss_falls_on_real_stories(tmp_path, shared):
    """A small language model that was really trained gets better at rows that it is not trained on."""
    sft.train(tiny_args(tmp_path, model=str(shared / "models/stories260K"), dataset=str(shared / "data/sft_tinystories_prompt_completion.jsonl"),
                        max_steps=12, batch_size=8, eval_size=20, learning_rate=3e-3))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.01


def test_two_processes_take_the_same_steps_as_one(tmp_path, monkeypatch, write_jsonl):
    """Also in the last step of an epoch, whose single row leaves the second process without any."""
    rows = [json.loads(line) for line in (ROOT / "tiny/data/sft_train.jsonl").read_text().splitlines()[:11]]
    flags = ["--dataset", write_jsonl(rows), "--eval-dataset", "tiny/data/sft_heldout.jsonl", "--eval-size", "5", "--batch-size", "5", "--epochs", "1",
             "--sample-size", "2", "--max-new-tokens", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541", "sft.py", *flags]
    run = subprocess.run([*command, "--output-dir", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr("sys.argv", ["sft.py", *flags, "--output-dir", str(tmp_path / "one")])
    sft.train(sft.parse_args(sft.Args, sft.__doc__))
    one, two = ([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6) for name in ("loss", "grad_norm"))
