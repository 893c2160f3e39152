"""The reward model: the loss, the token at which a reward is read, pairs, training by hand.

tests/system/test_loop.py tests what all scripts share: the optimizer step, dtypes, processes.
"""
import argparse
import math
from types import SimpleNamespace

import by_hand
import pytest
import torch
from by_hand import ask, close, same, say
from conftest import ROOT
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import prm
import reward_model

PAIR = {"prompt": ask("What is 1 + 1?"), "chosen": say("1 + 1 = 2"), "rejected": say("1 + 1 = 30")}


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def encode(row, max_length=512):
    return reward_model.encode_comparison(row, by_hand.tokenizer(), max_length)


# ---- the loss ------------------------------------------------------------------------------------

def test_the_worked_example():
    """Each number of the docstring, computed by the script's functions."""
    def loss_of(chosen, rejected, margin=0.0, centering=0.0):
        r_w, r_l = rewards(chosen), rewards(rejected)
        loss = reward_model.reward_loss(r_w, r_l, torch.tensor([margin]), centering)
        return loss.item(), *(g.item() for g in torch.autograd.grad(loss.sum(), (r_w, r_l)))

    preference, slope, _ = loss_of(1.2, 0.2)
    loss, of_chosen, of_rejected = loss_of(1.2, 0.2, centering=0.01)
    shifted = loss_of(11.2, 10.2, centering=0.01)[0] - loss_of(11.2, 10.2)[0]
    by_hand.documented(
        reward_model, ("σ(1.0) = {:.3f}", math.exp(-preference)), ("= {:.3f} + 0.020", preference),
        ("+ 0.020 = {:.3f}", loss), ("gradient: {:.3f} + 0.028", slope),
        ("+ 0.028 = {:.3f} in r(x, y_w)", of_chosen),
        ("+ 0.028 = {:.3f} in r(x, y_l)", of_rejected),
        ("−log σ(0.5) = {:.3f}", loss_of(1.2, 0.2, margin=0.5)[0]),
        ("−log σ(−1.0) = {:.3f}", loss_of(0.2, 1.2)[0]), ("the second grows to {:.3f}", shifted))


def test_the_gradient_is_the_probability_of_the_wrong_order():
    """d loss / d r_w = −σ(r_l − r_w + m), and d loss / d r_l is its negative.

    Where σ underflows to 0, the loss is the difference of the rewards.
    """
    chosen, rejected = rewards(0.3, -2.0, 5.0, -1e4), rewards(0.1, 1.0, -40.0, 1e4)
    margin = torch.tensor([0.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    losses = reward_model.reward_loss(chosen, rejected, margin, 0.0)
    of_chosen, of_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    lead = (rejected - chosen + margin).detach()
    expected = torch.logaddexp(lead, torch.zeros(4).double())  # log(1 + exp(lead)) = −log σ(−lead)
    same(losses.detach(), expected, "losses: is it log(sigmoid(x)) instead of logsigmoid(x)?")
    same(of_chosen, -torch.sigmoid(lead), "gradient: is the sign of r_w or of m flipped?")
    same(of_rejected, torch.sigmoid(lead), "gradient w.r.t. r_l")


def test_a_tie_is_half_correct_and_the_spread_is_that_of_all_rewards(monkeypatch):
    """Two of four pairs are in the correct order, one is a tie."""
    scored = torch.tensor([1.0, 0.0, 2.0, 5.0, 1.0, 1.0, 0.0, 2.0])  # 4 chosen, then 4 rejected
    monkeypatch.setattr(reward_model, "sequence_rewards", lambda *args: scored)
    model = common.load_model("tiny/chat", lora_rank=1, task="SEQ_CLS")
    args = argparse.Namespace(centering=0.0)
    losses, figures = reward_model.comparison_losses(model, [encode(PAIR)] * 4, args, 0)
    sums = {name: values.sum().item() for name, values in figures.items()}
    expected = {"loss": losses.mean(), "accuracy": 2.5 / 4, "margin": 1, "reward": 1.5,
                "reward_spread": 1.5}
    close(reward_model.describe(sums, 4), expected, "figures of four pairs")


# ---- the token at which a reward is read ---------------------------------------------------------

@pytest.mark.parametrize("pad", [0, 7, 40])
def test_padding_changes_no_reward_and_no_step(pad):
    """Some of these sequences contain the pad token themselves, even at the end.

    A reward is read at the last token, and the logits of prm.py at the last tokens of steps, of
    which rows have one to three.
    """
    model = common.load_model("tiny/chat", lora_rank=1, task="SEQ_CLS").eval()
    head = common.causal_lm(model).score
    rows = ([3, 9, 12, pad], [1, 3]), ([pad, 3, pad, pad, 8, 1], [0, 2, 5]), ([5], [0])
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids), "step_ends": ends}
                for ids, ends in rows]
    batch = prm.collate(examples, pad, "cpu")
    rewards = reward_model.sequence_rewards(model, batch, head)  # [B]
    logits = prm.step_logits(model, batch, head)  # [B, S]
    for reward, of_steps, (ids, ends) in zip(rewards, logits, rows, strict=True):
        for k, end in enumerate(ends):
            alone = by_hand.hidden_states(model, ids[:end + 1])[-1] @ head.weight[0]
            close(of_steps[k], alone, f"logit of step {k}", rel=1e-4, absolute=1e-5)
        close(reward, alone, "reward in a padded batch", rel=1e-4, absolute=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read", [reward_model.sequence_rewards, prm.step_logits])
def test_under_autocast_the_head_is_not_rounded(read, dtype):
    """A 16-bit matrix product would give two similar answers, or steps, the same number."""
    head = nn.Linear(64, 1, bias=False)
    nn.init.constant_(head.weight, 1.0)
    hidden = torch.full((2, 1, 64), 1.0) + torch.tensor([0.0, 1e-4])[:, None, None]
    model = SimpleNamespace(base_model=lambda **inputs: (hidden,))
    ones = torch.ones(2, 1, dtype=torch.long)
    batch = {"input_ids": ones, "attention_mask": ones, "step_ends": 0 * ones}
    with torch.autocast("cpu", dtype):
        low, high = read(model, batch, head).flatten()
    close(high - low, 64e-4, "difference of two rewards", rel=0.01)


# ---- pairs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, chosen, rejected", [
    (PAIR, "assistant\n1 + 1 = 2", "assistant\n1 + 1 = 30"),
    ({"chosen": ask("?") + say("2"), "rejected": ask("?") + say("3")},
     "assistant\n2", "assistant\n3"),
    ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3<|im_end|>"}, "1 + 1 = 2", "1 + 1 = 3"),
    ({"chosen": "1 + 1 = 2<|im_end|>", "rejected": "1 + 1 = 3"}, "1 + 1 = 2", "1 + 1 = 3"),
])
def test_sequences_end_where_a_sampled_answer_would_end(row, chosen, rejected):
    """Each ends with one end-of-turn token, without the template's newline or a second eos."""
    pair, tokenizer = encode(row), by_hand.tokenizer()
    for side, text in ("chosen", chosen), ("rejected", rejected):
        ids = pair[side]["input_ids"]
        assert tokenizer.decode(ids).endswith(text + "<|im_end|>"), side
        assert ids[-1] == tokenizer.eos_token_id != ids[-2], side
        assert ids[:len(pair["prompt"])] == pair["prompt"]
        assert pair[side]["attention_mask"] == [1] * len(ids)


def test_a_pair_is_never_truncated():
    """It is kept whole if its longer answer just fits, and refused if it does not."""
    pair = encode(PAIR)
    longest = len(pair["rejected"]["input_ids"])
    assert longest == pair["length"] > len(pair["chosen"]["input_ids"])
    assert encode(PAIR, longest) == pair
    for row in PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}:
        with pytest.raises(ValueError, match=f"longer than {longest - 1} tokens"):
            encode(row, longest - 1)


def test_the_column_margin_is_optional_and_must_be_a_finite_number():
    margins = [encode(PAIR | more)["margin"] for more in ({}, {"margin": 2}, {"margin": 0.5})]
    assert margins == [0.0, 2.0, 0.5]
    for bad in "much", math.nan, math.inf, [1]:
        with pytest.raises((ValueError, TypeError)):
            encode(PAIR | {"margin": bad})


# ---- a few steps of training by hand, and the saved model ----------------------------------------

def figures_by_hand(model, rows, centering):
    """The Bradley-Terry loss with margin and centering, and every logged figure."""
    losses, leads, scores = [], [], []
    for row in rows:
        chosen, rejected = (model(input_ids=torch.tensor(
            [by_hand.prompt_ids(row["prompt"]) + by_hand.answer_ids(row[side][0]["content"])]
        )).logits[0, 0] for side in ("chosen", "rejected"))
        won = 1 / (1 + torch.exp(rejected - chosen + row.get("margin", 0)))
        losses.append(-torch.log(won) + centering * (chosen + rejected) ** 2)
        leads.append((chosen - rejected).item())
        scores += [chosen.item(), rejected.item()]
    loss, mean = sum(losses) / len(rows), sum(scores) / len(scores)
    correct = sum((lead > 0) + (lead == 0) / 2 for lead in leads)
    spread = math.sqrt(sum((r - mean) ** 2 for r in scores) / len(scores))
    return loss, {"loss": loss.item(), "accuracy": correct / len(rows), "reward": mean,
                  "margin": sum(leads) / len(leads), "reward_spread": spread}


@pytest.mark.parametrize("base", ["tiny/chat", "tiny/base"])
def test_training_is_what_it_is_by_hand(base, tmp_path):
    """Checks each logged figure and each weight, and that plain transformers reads the folder."""
    rows = []
    for i in range(14):
        pair = {"chosen": say(f"{i}" + " = 7" * (i % 3)), "rejected": say("8 " * (i % 5) + "is it")}
        margin = {"margin": 1 + i / 8} if i % 2 else {}
        rows.append({"prompt": ask(f"Add {i}" + " and 1" * (i % 4)), **pair, **margin})
    trained, held_out = rows[:9], rows[9:]
    run = by_hand.Run(reward_model, tmp_path, trained, held_out,
                      ["comparison_losses", "show_worst"], model=base, centering=0.05, epochs=1,
                      micro_batch_size=3)
    assert all(update.is_training for update in run.updates), "evaluate() left eval mode on"
    if base == "tiny/chat":  # by_hand writes the end of turn of tiny/chat
        hand = by_hand.Training(run)
        expected = figures_by_hand(hand.model, held_out, 0.05)[1]
        close(run.summary["before"], expected, "held out, before")
        row_of = {tuple(encode(row)["chosen"]["input_ids"]): row for row in trained}
        for batch in run.batches("comparison_losses"):
            batch = [row_of[tuple(pair["chosen"]["input_ids"])] for pair in batch]
            loss, figures = figures_by_hand(hand.model, batch, 0.05)
            hand.log(figures | hand.update(loss))
        hand.check(run)
        figures = figures_by_hand(hand.model, held_out, 0.05)[1]
        close(run.summary["after"], figures, "held out, after")
        leads = run.calls["show_worst"][0].args[2]
        for row, lead in zip(held_out, leads, strict=True):
            close(lead, figures_by_hand(hand.model, [row], 0.05)[1]["margin"], "lead of a pair")

    # Transformers reads the last token that is not a pad, so the pad must not end an answer.
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    plain = AutoModelForSequenceClassification.from_pretrained(ROOT / base, num_labels=1)
    plain.config.pad_token_id = tokenizer.pad_token_id
    model, leads = PeftModel.from_pretrained(plain.double(), run.folder).eval(), 0
    for side, sign in ("chosen", 1), ("rejected", -1):
        chats = [row["prompt"] + row[side] for row in held_out]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip() for chat in chats]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        assert not batch["attention_mask"].all()
        with torch.no_grad():
            leads += sign * model(**batch).logits[:, 0]
    close(leads.mean(), run.summary["after"]["margin"], "margin by transformers", rel=1e-3)


def test_the_pair_shown_is_the_most_confident_mistake(capsys):
    pairs = [encode(PAIR | {"chosen": say(f"good {i}"), "rejected": say(f"bad {i}")})
             for i in range(3)]
    reward_model.show_worst(by_hand.tokenizer(), pairs, torch.tensor([-1.0, -3.5, 5.0]))
    shown = capsys.readouterr().out
    assert "good 1" in shown and "bad 1" in shown and "by 3.500" in shown and "good 0" not in shown
    reward_model.show_worst(by_hand.tokenizer(), pairs, torch.tensor([1.0, 1.0, 1.0]))
    assert capsys.readouterr().out == "", "a pair is shown, although no pair is ordered wrongly"
