"""The reward model: its loss, where a reward is read, the pairs, and what others load of it.

The loop as a whole is proven in test_sft_reward_loop.py.
"""
import json
import math

import pytest
import torch
from conftest import ROOT, run_args
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import common
import reward_model

ASK = [{"role": "user", "content": "What is 1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


PAIR = {"prompt": ASK, "chosen": say("1 + 1 = 2"), "rejected": say("1 + 1 = 30")}


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def tokenizer():
    """Of tiny/chat: eos is the end of turn, pad is another token."""
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


# ---- the loss ------------------------------------------------------------------------------------

def test_gradient_is_that_of_bradley_and_terry():
    """d L / d r_w = −σ(r_l − r_w + m), and the opposite for r_l."""
    chosen, rejected = rewards(0.3, -2.0, 5.0), rewards(0.1, 1.0, -40.0)
    margin = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    losses = reward_model.reward_loss(chosen, rejected, margin, 0.0)
    truth = -torch.log(1 / (1 + torch.exp(rejected - chosen + margin)))
    assert torch.allclose(losses, truth, atol=1e-12)
    losses.sum().backward()
    wrong = 1 / (1 + torch.exp(chosen - rejected - margin))
    assert torch.allclose(chosen.grad, -wrong, atol=1e-12)
    assert torch.equal(rejected.grad, -chosen.grad)


def test_equal_rewards_cost_log_2():
    """A model that cannot tell the answers apart."""
    loss = reward_model.reward_loss(rewards(3.0), rewards(3.0), torch.zeros(1), 0.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_loss_is_finite_for_rewards_far_apart():
    """Where σ is 0 in every number format, the loss is the distance and its gradient −1."""
    chosen = rewards(-1e4)
    losses = reward_model.reward_loss(chosen, rewards(1e4), torch.zeros(1), 0.0)
    losses.backward()
    assert losses.item() == pytest.approx(2e4) and chosen.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_loss_passes_gradcheck(centering):
    """With margins, for pairs in the right and in the wrong order."""
    margin = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: reward_model.reward_loss(chosen, rejected, margin, centering),
        (rewards(0.5, -1.0), rewards(1.5, 0.2)))


def test_a_shift_of_all_rewards_changes_only_the_centering_term():
    """That term pulls the sum of a pair to 0, whatever its difference."""
    chosen, rejected, none = rewards(0.5, -1.0), rewards(1.5, 0.2), torch.zeros(2)
    plain = reward_model.reward_loss(chosen, rejected, none, 0.0)
    shifted = reward_model.reward_loss(chosen + 7, rejected + 7, none, 0.0)
    assert torch.allclose(shifted, plain)
    centered = reward_model.reward_loss(chosen + 7, rejected + 7, none, 0.5)
    assert torch.allclose(centered - plain, torch.tensor([0.5 * 16**2, 0.5 * 13.2**2]).double())


def test_a_margin_asks_for_more_distance():
    """As if the chosen reward were lower by it: a pair closer than that has over half the pull."""
    chosen, rejected = rewards(2.0), rewards(1.0)
    loss = reward_model.reward_loss(chosen, rejected, torch.tensor([3.0]), 0.0)
    assert torch.allclose(
        loss, reward_model.reward_loss(chosen - 3, rejected, torch.zeros(1), 0.0))
    loss.backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(-2)))


# ---- where the reward is read --------------------------------------------------------------------

@pytest.mark.parametrize("pad", [0, 7, 40])
def test_padding_changes_no_reward(pad):
    """Also where a sequence ends with, or is full of, tokens equal to the pad."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=0,
        initializer_range=0.5)
    model = Qwen2ForSequenceClassification(config).eval()
    for ids in [3, 9, 12, pad], [pad, 3, pad, pad], [5]:
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        truth = (hidden * model.score.weight[0]).sum()
        padded, mask = ids + [pad] * 3, [1] * len(ids) + [0] * 3
        batch = {"input_ids": torch.tensor([padded, padded]),
                 "attention_mask": torch.tensor([mask, [1] * len(padded)])}
        first, second = reward_model.sequence_rewards(model, batch, model.score)
        assert torch.allclose(first, truth, atol=1e-5) and not torch.allclose(second, truth)


def test_only_the_last_real_token_of_each_sequence_gets_a_gradient():
    """There it is the weight of the head, everywhere else exactly 0."""
    class Fixed(nn.Module):
        hidden = nn.Parameter(torch.randn(3, 5, 4))

        def base_model(self, **inputs):
            return (self.hidden,)

    model, head = Fixed(), nn.Linear(4, 1, bias=False)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    reward_model.sequence_rewards(model, batch, head).sum().backward()
    truth = torch.zeros(3, 5, 4)
    for row, last in (0, 2), (1, 4), (2, 0):
        truth[row, last] = head.weight[0].detach()
    assert torch.equal(model.hidden.grad, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_head_is_not_rounded(dtype):
    """In 16 bits a product of matrices would give answers of like quality the same reward."""
    class Fixed(nn.Module):
        def base_model(self, **inputs):
            return (torch.full((2, 1, 64), 1.0) + torch.tensor([0.0, 1e-4])[:, None, None],)

    head = nn.Linear(64, 1, bias=False)
    nn.init.constant_(head.weight, 1.0)
    ones = torch.ones(2, 1, dtype=torch.long)
    with torch.autocast("cpu", dtype):
        low, high = reward_model.sequence_rewards(
            Fixed(), {"input_ids": ones, "attention_mask": ones}, head)
    assert (high - low).item() == pytest.approx(64e-4, rel=0.01)


def test_collate_pads_by_length():
    """Pad may be a token that also stands in, or ends, a sequence."""
    examples = []
    for ids in [1, 2, 0], [1, 0], [1, 0], [1, 2, 3, 0]:
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    for pad in 0, 5:
        batch = reward_model.collate(examples, pad, "cpu")
        assert batch["input_ids"].tolist() == [
            [1, 2, 0, pad], [1, 0, pad, pad], [1, 0, pad, pad], [1, 2, 3, 0]]
        assert batch["attention_mask"].sum(-1).tolist() == [3, 2, 2, 4]


# ---- data ----------------------------------------------------------------------------------------

TEXTS = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}


@pytest.mark.parametrize("row, chosen, rejected", [
    (PAIR, "assistant\n1 + 1 = 2", "assistant\n1 + 1 = 30"),
    ({"chosen": ASK + say("2"), "rejected": ASK + say("3")}, "assistant\n2", "assistant\n3"),
    (TEXTS, "1 + 1 = 2", "1 + 1 = 3"),
    (TEXTS | {"chosen": " 2<|im_end|>", "rejected": " 3<|im_end|>"}, "1 + 1 = 2", "1 + 1 = 3"),
    ({"chosen": "1 + 1 = 2<|im_end|>", "rejected": "1 + 1 = 3"}, "1 + 1 = 2", "1 + 1 = 3"),
])
def test_sequences_end_where_a_sampled_answer_would_end(tokenizer, row, chosen, rejected):
    """In one end of turn: no newline of the template behind it, and no second eos."""
    pair = reward_model.encode_comparison(row, tokenizer, 512)
    for side, text in ("chosen", chosen), ("rejected", rejected):
        ids = pair[side]["input_ids"]
        assert tokenizer.decode(ids).endswith(text + "<|im_end|>")
        assert ids[-1] == tokenizer.eos_token_id != ids[-2]
        assert ids[:len(pair["prompt"])] == pair["prompt"]
        assert pair[side]["attention_mask"] == [1] * len(ids)


def test_overlong_pairs_are_dropped_and_counted_never_cut(tokenizer, capsys):
    """A pair stays whole up to its longer answer's very length."""
    pair = reward_model.encode_comparison(PAIR, tokenizer, 512)
    longest = len(pair["rejected"]["input_ids"])
    assert longest > len(pair["chosen"]["input_ids"])
    rows = [PAIR, PAIR | {"rejected": say("1 + 1 = 300")}, PAIR | {"chosen": say("1 + 1 = 200")}]
    kept = common.encode_rows("x", rows, reward_model.encode_comparison, tokenizer, longest)
    assert kept == [pair]
    out = capsys.readouterr().out
    assert f"2 rows cannot be used, the first is row 2: it is longer than {longest} tokens" in out


def test_margin_column_is_optional_and_must_be_a_number(tokenizer):
    """Without one, answers need be no further apart than in order."""
    margins = []
    for more in {}, {"margin": 2}, {"margin": 0.5}:
        margins.append(reward_model.encode_comparison(PAIR | more, tokenizer, 512)["margin"])
    assert margins == [0.0, 2.0, 0.5]
    for bad in "much", math.nan, math.inf, [1]:
        with pytest.raises((ValueError, TypeError)):
            reward_model.encode_comparison(PAIR | {"margin": bad}, tokenizer, 512)


@pytest.mark.parametrize("row", [
    {"prompt": "a", "completion": "b"}, PAIR | {"rejected": PAIR["chosen"]},
    PAIR | {"chosen": 0.5}, {"chosen": say("2"), "rejected": say("3")}, PAIR | {"chosen": []},
    PAIR | {"margin": "big"}, TEXTS | {"rejected": ""}, {"chosen": "a", "rejected": "b"},
    {"chosen": ASK + say("2"), "rejected": [{"role": "user", "content": "Why?"}] + say("3")},
])
def test_a_row_that_cannot_be_used_is_dropped_and_counted(row, tokenizer, capsys):
    """The others stay, and the first that went is named with its reason."""
    kept = common.encode_rows(
        "x", [PAIR, row, row], reward_model.encode_comparison, tokenizer, 512)
    assert kept == [reward_model.encode_comparison(PAIR, tokenizer, 512)]
    report = "3 rows, 1 examples; 2 rows cannot be used, the first is row 2: "
    assert report in capsys.readouterr().out


def test_pairs_of_the_same_tokens_are_refused(tokenizer):
    """Different messages, until the template trims them."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content | trim")
    assert "trim" in tokenizer.chat_template
    with pytest.raises(ValueError):
        reward_model.encode_comparison(PAIR | {"rejected": say("1 + 1 = 2 ")}, tokenizer, 512)


@pytest.mark.parametrize("rows, flags, message", [
    ([{"prompt": "a", "completion": "b"}], {}, "columns: prompt, completion"),
    ([PAIR], {}, "too few different prompts"),
    ([PAIR], {"max_length": 8}, "longer than 8 tokens"),
    ([PAIR | {"margin": "big"}], {}, "row 1: "),
])
def test_bad_rows_end_in_one_line_before_the_model_is_loaded(
        rows, flags, message, tmp_path, write_jsonl, refused, monkeypatch):
    """And leave no folder behind."""
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    args = run_args(
        reward_model, dataset=write_jsonl(rows), output_dir=tmp_path / "run", **flags)
    assert message in refused(reward_model.train, args)
    assert not (tmp_path / "run").exists()


# ---- what is left --------------------------------------------------------------------------------

def test_saved_pad_token_never_ends_an_answer():
    """Of tiny/base, pad, eos and the end of turn are one; of tiny/chat, pad is apart already."""
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/base"))
    ends = {tokenizer.eos_token_id, common.end_of_turn_id(tokenizer)}
    assert tokenizer.pad_token_id in ends
    reward_model.pad_apart(tokenizer)
    assert tokenizer.pad_token_id not in ends
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/chat"))
    pad = tokenizer.pad_token_id
    reward_model.pad_apart(tokenizer)
    assert tokenizer.pad_token_id == pad


@pytest.mark.parametrize("base", ["tiny/chat", "tiny/base"])
def test_saved_scores_agree_with_plain_transformers_and_peft(base, tmp_path, write_jsonl):
    """Base, adapter and tokenizer as anyone would load them give, in a padded batch, `after`."""
    text = (ROOT / "tiny/data/preference_heldout.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()[:14]]
    args = run_args(
        reward_model, model=base, dataset=write_jsonl(rows[:8]), batch_size=4, max_steps=2,
        eval_dataset=write_jsonl(rows[8:], "held_out.jsonl"), output_dir=tmp_path / "run")
    reward_model.train(args)
    after = json.loads((tmp_path / "run/summary.json").read_text())["after"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    plain = AutoModelForSequenceClassification.from_pretrained(
        ROOT / base, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(plain, tmp_path / "run").eval()
    ours = common.load_model(str(tmp_path / "run"), trainable=False, task="SEQ_CLS")
    scores = {}
    for side in "chosen", "rejected":
        chats = [row["prompt"] + row[side] for row in rows[8:]]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip() for chat in chats]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        assert not batch["attention_mask"].all()
        with torch.no_grad():
            scores[side] = model(**batch).logits[:, 0]
            mine = reward_model.sequence_rewards(ours, batch, common.causal_lm(ours).score)
        assert torch.allclose(scores[side], mine, atol=1e-5)
    assert scores["chosen"].std() > 1e-3
    margin = (scores["chosen"] - scores["rejected"]).mean().item()
    assert margin == pytest.approx(after["margin"], abs=1e-5)
