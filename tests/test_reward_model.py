import json
import math
import subprocess
import sys
from pathlib import Path

import common
import pytest
import reward_model
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
ASK = [{"role": "user", "content": "What is 1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


PAIR = {"prompt": ASK, "chosen": say("1 + 1 = 2"), "rejected": say("1 + 1 = 30")}


def small_model():
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         num_labels=1, pad_token_id=0, initializer_range=0.5)
    return Qwen2ForSequenceClassification(config).eval()


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def tiny_args(tmp_path, **kwargs):
    return reward_model.Args(**{"output_dir": str(tmp_path / "run"), "max_steps": 6, "eval_size": 8, "batch_size": 8, "micro_batch_size": 4} | kwargs)


# ---- the loss ---------------------------------------------------------------------------------------------

def test_gradient_is_that_of_bradley_and_terry():
    """d L / d r_w = −σ(r_l − r_w + m), and the opposite for r_l."""
    chosen, rejected, margin = rewards(0.3, -2.0, 5.0), rewards(0.1, 1.0, -40.0), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    losses = reward_model.reward_loss(chosen, rejected, margin, 0.0)
    assert torch.allclose(losses, -torch.log(torch.sigmoid(chosen - rejected - margin)), atol=1e-12)
    losses.sum().backward()
    assert torch.allclose(chosen.grad, -torch.sigmoid(rejected - chosen + margin), atol=1e-12) and torch.equal(rejected.grad, -chosen.grad)


def test_loss_is_finite_for_rewards_far_apart():
    chosen = rewards(-1e4)
    losses = reward_model.reward_loss(chosen, rewards(1e4), torch.zeros(1), 0.0)
    losses.backward()
    assert losses.item() == pytest.approx(2e4) and chosen.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_loss_passes_gradcheck(centering):
    margin = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r: reward_model.reward_loss(c, r, margin, centering), (rewards(0.5, -1.0), rewards(1.5, 0.2)))


def test_a_shift_of_all_rewards_changes_only_the_centering_term():
    chosen, rejected, none = rewards(0.5, -1.0), rewards(1.5, 0.2), torch.zeros(2)
    assert torch.allclose(reward_model.reward_loss(chosen + 7, rejected + 7, none, 0.0), reward_model.reward_loss(chosen, rejected, none, 0.0))
    shifted = reward_model.reward_loss(chosen + 7, rejected + 7, none, 0.5) - reward_model.reward_loss(chosen, rejected, none, 0.0)
    assert torch.allclose(shifted, 0.5 * (chosen + rejected + 14) ** 2)
    centre = rewards(3.0)  # centering pulls the sum of a pair to 0, whatever its difference
    reward_model.reward_loss(centre, centre.detach(), torch.zeros(1), 0.5).backward()
    assert centre.grad.item() == pytest.approx(-0.5 + 2 * 0.5 * 6)


def test_a_margin_asks_for_more_distance():
    """It moves the loss along as if the chosen reward were lower by it; the gradient of a pair closer than its margin is over a half."""
    chosen, rejected = rewards(2.0), rewards(1.0)
    loss = reward_model.reward_loss(chosen, rejected, torch.tensor([3.0]), 0.0)
    assert torch.allclose(loss, reward_model.reward_loss(chosen - 3, rejected, torch.zeros(1), 0.0))
    loss.backward()
    assert chosen.grad.item() < -0.5


# ---- where the reward is read -----------------------------------------------------------------------------

@pytest.mark.parametrize("pad", [0, 7, 40])
def test_padding_on_either_side_and_none_give_the_same_reward(pad):
    """Also where the sequence ends with, or is full of, tokens equal to the pad token."""
    model = small_model()
    for ids in ([3, 9, 12, pad], [pad, 3, pad, pad], [5]):
        n = len(ids)
        alone = reward_model.sequence_rewards(model, torch.tensor([ids]), torch.ones(1, n, dtype=torch.long))
        expected = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1])[0]
        right = reward_model.sequence_rewards(model, torch.tensor([ids + [pad] * 3]), torch.tensor([[1] * n + [0] * 3]))
        left = reward_model.sequence_rewards(model, torch.tensor([[pad] * 3 + ids]), torch.tensor([[0] * 3 + [1] * n]))
        assert torch.allclose(torch.cat([alone, right, left]), expected.expand(3), atol=1e-6)


def test_collate_pads_by_length():
    pairs = [{"chosen": [1, 2, 0], "rejected": [1, 0]}, {"chosen": [1, 0], "rejected": [1, 2, 3, 0]}]
    batch = reward_model.collate(pairs, 0, "cpu")
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 2, 3, 0]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 2, 2, 4]


# ---- data -------------------------------------------------------------------------------------------------

def tiny_tokenizer():
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


def test_sequences_end_where_a_sampled_answer_would_end():
    """Behind the end of the turn the template writes a newline, which no sampled answer has."""
    tokenizer = tiny_tokenizer()
    pair = reward_model.encode_comparison(PAIR, tokenizer, 512)
    for side, text in (("chosen", "1 + 1 = 2"), ("rejected", "1 + 1 = 30")):
        assert tokenizer.decode(pair[side]).endswith(text + "<|im_end|>") and pair[side][:len(pair["prompt"])] == common.encode_prompt(tokenizer, ASK)
    strings = reward_model.encode_comparison({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, tokenizer, 512)
    assert tokenizer.decode(strings["chosen"]) == "1 + 1 = 2<|im_end|>" and tokenizer.decode(strings["rejected"]) == "1 + 1 = 3<|im_end|>"


def test_overlong_pairs_are_dropped_and_counted_never_cut(capsys):
    tokenizer = tiny_tokenizer()
    pair = reward_model.encode_comparison(PAIR, tokenizer, 512)
    longest = max(len(pair["chosen"]), len(pair["rejected"]))
    assert reward_model.encode_comparison(PAIR, tokenizer, longest) == pair
    assert reward_model.encode_comparison(PAIR, tokenizer, longest - 1) is None
    long = PAIR | {"rejected": say("1 + 1 = 3000")}
    encode = lambda row: reward_model.encode_comparison(row, tokenizer, longest)  # noqa: E731
    kept = reward_model.encode_rows([PAIR, long], encode, ("chosen", "rejected"), "x.jsonl", longest)
    assert kept == [pair] and f"2 rows: 1 within --max-length {longest}; 1 dropped as too long" in capsys.readouterr().out


def test_margin_column_is_optional_and_must_be_a_number():
    tokenizer = tiny_tokenizer()
    assert [reward_model.encode_comparison(PAIR | more, tokenizer, 512)["margin"] for more in ({}, {"margin": None}, {"margin": 2})] == [0.0, 0.0, 2.0]
    for bad in ("much", math.nan, [1]):
        with pytest.raises(ValueError, match="margin"):
            reward_model.encode_comparison(PAIR | {"margin": bad}, tokenizer, 512)


def test_calibration_of_a_calibrated_and_of_a_boastful_model():
    """Margins drawn so that σ(margin) is the true rate have an error near 0; tripled margins do not."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(20000, generator=generator, dtype=torch.float64) * 3
    difference = torch.where(torch.rand(20000, generator=generator, dtype=torch.float64) < strength.sigmoid(), strength, -strength)
    error, rows = reward_model.calibration(difference)
    assert error < 0.02 and sum(row[2] for row in rows) == 20000 and all(low <= predicted <= high for low, high, _, predicted, _ in rows)
    assert reward_model.calibration(3 * difference)[0] > 0.1
    assert reward_model.calibration(torch.zeros(3, dtype=torch.float64)) == (0.0, [(0.5, 0.6, 3, 0.5, 0.5)])  # ties: half right, as predicted


# ---- runs -------------------------------------------------------------------------------------------------

def test_bad_input_ends_in_one_line_before_the_model_is_loaded(tmp_path, write_jsonl, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    good = [PAIR | {"prompt": [{"role": "user", "content": str(i)}]} for i in range(10)]
    cases = [
        ([{"prompt": "a", "completion": "b"}], {}, "has no chosen and no rejected"),
        ([PAIR | {"rejected": PAIR["chosen"]}], {}, "chosen equals rejected"),
        ([PAIR | {"chosen": "1 + 1 = 2"}], {}, "must all be strings or all be lists"),
        ([*good, PAIR | {"margin": "big"}], {}, "row 11: the margin must be a finite number"),
        ([], {}, "is empty"),
        (good[:1], {}, "too few different prompts"),
        (good, {"max_length": 8}, "no row is left"),
        (good, {"centering": -1.0}, "--centering"),
        (good, {"lora_rank": 0}, "--lora-rank"),
    ]
    for rows, flags, message in cases:
        assert message in refused(reward_model.train, tiny_args(tmp_path, dataset=write_jsonl(rows), **flags))
    assert "cannot be read" in refused(reward_model.train, tiny_args(tmp_path, dataset="none.jsonl"))
    assert not (tmp_path / "run").exists()


def test_saved_scores_agree_with_plain_transformers_and_peft(tmp_path, capsys):
    """Base and adapter as anyone would load them, in a padded batch, and as common.py loads them, give the scores of the trained model."""
    reward_model.train(tiny_args(tmp_path))
    out, folder = capsys.readouterr().out, str(tmp_path / "run")
    assert "predicted" in out and "calibration_error" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["method"] == "reward_model" and {"loss", "accuracy", "margin", "calibration_error"} <= summary["after"].keys() == summary["before"].keys()
    logged = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert [line["learning_rate"] for line in logged] == pytest.approx([1e-3 * min((n + 1) / 2, 0.5 + 0.5 * math.cos(math.pi * n / 6)) for n in range(6)])
    assert len(logged) == 6 and {"loss", "accuracy", "margin", "reward_mean", "reward_spread", "grad_norm"} <= logged[0].keys()

    rows = [json.loads(line) for line in (ROOT / "tiny/data/preference_heldout.jsonl").read_text().splitlines()[:8]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [reward_model.encode_comparison(row, tokenizer, 512) for row in rows]
    batch = reward_model.collate(pairs, tokenizer.pad_token_id, "cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(ROOT / "tiny/chat", num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    ours = common.load_model(folder, trainable=False, task="SEQ_CLS")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, folder).eval()(**batch).logits[:, 0]
        mine = reward_model.sequence_rewards(ours, **batch)
    chosen, rejected = mine.chunk(2)
    assert torch.allclose(theirs, mine, atol=1e-5) and mine.std() > 0
    assert (chosen - rejected).mean().item() == pytest.approx(summary["after"]["margin"], abs=1e-5)


def test_the_gradient_of_a_step_is_that_of_the_mean_loss_and_is_clipped(tmp_path):
    """Eight pairs in micro-batches of four: loss and gradient norm of a step are those of one batch. Clipped to next to nothing, nothing moves."""
    args = tiny_args(tmp_path, max_steps=1)
    reward_model.train(args)
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    torch.manual_seed(0)
    model, tokenizer = common.load_model("tiny/chat", task="SEQ_CLS"), common.load_tokenizer("tiny/chat")
    rows = reward_model.load_rows("tiny/data/preference_train.jsonl", "train", 0, 0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:8]
    loss = reward_model.score_comparisons(model, [reward_model.encode_comparison(rows[i], tokenizer, 512) for i in order], args, tokenizer.pad_token_id)[0].mean()
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4) and logged["grad_norm"] == pytest.approx(norm, rel=1e-4)

    reward_model.train(tiny_args(tmp_path, max_steps=1, max_grad_norm=1e-9, learning_rate=1e-2, warmup_ratio=0.0, output_dir=str(tmp_path / "clipped")))
    moved = [w.abs().max().item() for name, w in load_file(tmp_path / "clipped/adapter_model.safetensors").items() if "lora_B" in name]
    assert 0 < max(moved) < 2e-3  # Adam divides by |g| + 1e-8


def test_a_tie_is_half_right_and_figures_are_those_of_all_rewards():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 2.0, 5.0], [1.0, 1.0, 0.0, 2.0]])
    assert reward_model.summarise(scores) == pytest.approx({"loss": 2.5, "accuracy": 0.625, "margin": 1.0, "reward_mean": 1.5, "reward_spread": 1.5})


def test_pairs_that_differ_only_behind_the_answer_are_refused():
    """Different messages of the same tokens, once what the template writes after the answer is cut."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content | trim")
    with pytest.raises(ValueError, match="the same tokens"):
        reward_model.encode_comparison(PAIR | {"rejected": say("1 + 1 = 2 ")}, tokenizer, 512)


def test_a_run_saves_a_pad_token_that_ends_no_answer(tmp_path):
    reward_model.train(tiny_args(tmp_path, model="tiny/base", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, common.end_of_turn_id(tokenizer))


def test_saved_pad_token_never_ends_an_answer():
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/base"))
    ends = {tokenizer.eos_token_id, common.end_of_turn_id(tokenizer)}
    assert tokenizer.pad_token_id in ends
    reward_model.pad_apart(tokenizer)
    assert tokenizer.pad_token_id not in ends


def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole, killed = (tiny_args(tmp_path, output_dir=str(tmp_path / name), save_every=2) for name in ("whole", "killed"))
    reward_model.train(whole)
    calls, loss = iter(range(100)), reward_model.reward_loss
    def dying(*args):
        if torch.is_grad_enabled() and next(calls) == 9:  # the second micro-batch of step 5
            raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(reward_model, "reward_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        reward_model.train(killed)
    monkeypatch.setattr(reward_model, "reward_loss", loss)
    monkeypatch.setattr("sys.argv", ["reward_model.py", "--resume", str(tmp_path / "killed")])
    reward_model.train(reward_model.parse_args(reward_model.Args, reward_model.__doc__))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and any("score" in name for name in one) and all(torch.equal(one[name], other[name]) for name in one)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["before"] == summaries[1]["before"] and summaries[0]["after"] == summaries[1]["after"]


def test_micro_batches_do_not_change_the_run(tmp_path):
    losses = []
    for size in (1, 8):
        reward_model.train(tiny_args(tmp_path, output_dir=str(tmp_path / str(size)), max_steps=3, micro_batch_size=size, centering=0.1))
        losses.append([[line[key] for key in ("loss", "margin", "grad_norm", "reward_mean")]
                       for line in map(json.loads, open(tmp_path / str(size) / "metrics.jsonl"))])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-5)


def test_two_processes_take_the_same_steps_as_one(tmp_path, monkeypatch, write_jsonl):
    """Also in the last step of an epoch, whose single row leaves the second process without any."""
    rows = [json.loads(line) for line in (ROOT / "tiny/data/preference_train.jsonl").read_text().splitlines()[:11]]
    flags = ["--dataset", write_jsonl(rows), "--eval-dataset", "tiny/data/preference_heldout.jsonl", "--eval-size", "5", "--batch-size", "5", "--epochs", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29543", "reward_model.py", *flags]
    run = subprocess.run([*command, "--output-dir", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr("sys.argv", ["reward_model.py", *flags, "--output-dir", str(tmp_path / "one")])
    reward_model.train(reward_model.parse_args(reward_model.Args, reward_model.__doc__))
    one, two = ([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6) for name in ("loss", "grad_norm"))
