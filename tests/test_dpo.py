import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import common
import dpo
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ["dpo", "ipo", "hinge", "simpo", "orpo", "cpo"]
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def small_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return Qwen2ForCausalLM(config).to(dtype)


def freeze_head(model):
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def random_batch(lengths=(9, 7, 8, 5), prompt=3, seed=1):
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    real = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 37, (len(lengths), width), generator=generator) * real
    return {"input_ids": ids, "attention_mask": real.long(), "loss_mask": (real & (torch.arange(width) >= prompt)).long()}


def sums(count, seed, low=-9.0, high=-1.0):
    return torch.empty(count, dtype=torch.float64).uniform_(low, high, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def args_for(model="tiny/chat", **kwargs):
    args = dpo.Args(model=model, **kwargs)
    dpo.check(args)
    return args


# ---- log-probs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_logps_pass_gradcheck(chunk):
    """The gradient computed in the forward pass is the derivative, for any chunk size and temperature."""
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    targets = torch.randint(0, 11, (7,))
    assert torch.autograd.gradcheck(lambda h: dpo.ChunkedLogps.apply(h, head, targets, 0.7, chunk), hidden)
    expected = (hidden @ head.T / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(dpo.ChunkedLogps.apply(hidden, head, targets, 0.7, chunk), expected, atol=1e-12)


def test_completion_logps_equal_the_full_log_softmax_with_gradients():
    """Scoring only the trained tokens gives the log-probs and the parameter gradients of the full logits."""
    model, batch = freeze_head(small_model()), random_batch()
    weights = torch.randn(4, 8, dtype=torch.float64)
    logps, hidden = dpo.completion_logps(model, **batch)
    (logps * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    naive = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0] * batch["loss_mask"][:, 1:]
    (naive * weights).sum().backward()
    assert torch.allclose(logps, naive, atol=1e-10)
    assert len(hidden) == batch["loss_mask"][:, 1:].sum()
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.allclose(grads[name], p.grad, atol=1e-10), name


def test_gradient_is_zero_exactly_outside_the_mask():
    """No hidden state whose next token is not trained gets a gradient; the one before the end-of-turn token does."""
    model, batch = freeze_head(small_model()), random_batch()
    states = {}
    model.model.norm.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), states.update(last=output))[0])
    dpo.completion_logps(model, **batch)[0].sum().backward()
    grad, trained = states["last"].grad[:, :-1], batch["loss_mask"][:, 1:].bool()
    assert (grad[~trained] == 0).all()
    assert (grad[trained].abs().sum(-1) > 0).all()
    for row, length in enumerate((9, 7, 8, 5)):
        assert trained[row, length - 2] and grad[row, length - 2].abs().sum() > 0
        assert states["last"].grad[row, length - 1:].abs().sum() == 0


def test_a_batch_without_a_trained_token_is_an_error():
    batch = random_batch()
    with pytest.raises(ValueError, match="without a single trained token"):
        dpo.completion_logps(small_model(), batch["input_ids"], batch["attention_mask"], torch.zeros_like(batch["loss_mask"]))


def test_exact_kl_is_the_sum_over_the_vocabulary():
    """Zero for equal states, and torch's own KL otherwise; never negative."""
    torch.manual_seed(0)
    h, r, head = torch.randn(20, 6), torch.randn(20, 6), torch.randn(9, 6)
    expected = F.kl_div((r @ head.T).log_softmax(-1), (h @ head.T).log_softmax(-1), log_target=True, reduction="batchmean")
    assert torch.allclose(dpo.exact_kl(h, r, head), expected, atol=1e-5)
    assert dpo.exact_kl(h, h, head) == 0


# ---- the loss ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", LOSSES)
def test_losses_pass_gradcheck(loss):
    chosen, rejected, ref_chosen, ref_rejected = (sums(5, seed) for seed in range(4))
    lengths = torch.tensor([3., 4., 5., 6., 7.]), torch.tensor([4., 4., 3., 2., 9.])
    assert torch.autograd.gradcheck(
        lambda c, r: dpo.preference_loss(c, r, ref_chosen.detach(), ref_rejected.detach(), *lengths, loss, 0.3, 0.1 if loss == "dpo" else 0.0, 0.5)[0], (chosen, rejected))


def test_orpo_stays_finite_for_answers_that_are_certain():
    """In fp32 a log-prob of −1e-9 is a probability of 1, whose odds are infinite."""
    chosen, rejected = (torch.tensor(means, requires_grad=True) for means in ([-1e-9, -1.0, -1e-9], [-1.0, -1e-9, -1e-9]))
    losses = dpo.preference_loss(chosen, rejected, None, None, torch.ones(3), torch.ones(3), "orpo", 0.1)[0]
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_dpo_has_its_closed_form_value_and_gradient():
    """L = −log σ(h), dL/dchosen = −β σ(−h), dL/drejected = +β σ(−h): eq. 7 and the gradient below it."""
    chosen, rejected, ref_chosen, ref_rejected = (sums(6, seed) for seed in range(4))
    losses, chosen_rewards, rejected_rewards = dpo.preference_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), None, None, "dpo", 0.4)
    h = 0.4 * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    assert torch.allclose(losses, torch.log1p(torch.exp(-h)))
    assert torch.allclose(chosen_rewards - rejected_rewards, h)
    losses.sum().backward()
    assert torch.allclose(chosen.grad, -0.4 * torch.sigmoid(-h))
    assert torch.allclose(rejected.grad, 0.4 * torch.sigmoid(-h))


def test_each_loss_against_its_equation_written_out():
    """One pair, numbers by hand with math only."""
    c, r, rc, rr, n, m, beta = -4.0, -6.0, -5.0, -5.5, 4, 3, 0.5
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (c, r, rc, rr, n, m)]

    def value(loss, **kwargs):
        return dpo.preference_loss(*tensors, loss, beta, **kwargs)[0].item()

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    h = (c - rc) - (r - rr)
    assert value("dpo") == pytest.approx(-log_sigmoid(beta * h))
    assert value("dpo", label_smoothing=0.2) == pytest.approx(-0.8 * log_sigmoid(beta * h) - 0.2 * log_sigmoid(-beta * h))
    assert value("ipo") == pytest.approx((h - 1 / (2 * beta)) ** 2)
    assert value("hinge") == pytest.approx(max(0, 1 - beta * h))
    assert value("simpo", gamma=0.3) == pytest.approx(-log_sigmoid(beta * (c / n - r / m) - 0.3))
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (c / n, r / m)]
    assert value("orpo") == pytest.approx(-c / n - beta * log_sigmoid(math.log(odds[0] / odds[1])))
    assert value("cpo") == pytest.approx(-log_sigmoid(beta * (c - r)) - c)


def test_optima_of_the_losses():
    """Smoothed DPO is least where σ(margin) = 1 − ε, IPO where the log-ratios differ by 1/(2β), hinge is flat beyond 1."""
    grid = torch.linspace(-5, 25, 60001, dtype=torch.float64)
    zero = torch.zeros_like(grid)
    smooth = dpo.preference_loss(grid, zero, zero, zero, None, None, "dpo", 0.5, label_smoothing=0.1)[0]
    assert torch.sigmoid(0.5 * grid[smooth.argmin()]).item() == pytest.approx(0.9, abs=1e-3)
    assert grid[dpo.preference_loss(grid, zero, zero, zero, None, None, "ipo", 0.1)[0].argmin()].item() == pytest.approx(5, abs=1e-3)
    hinge = dpo.preference_loss(grid, zero, zero, zero, None, None, "hinge", 0.5)[0]
    assert (hinge[grid > 2] == 0).all() and (hinge[grid < 2] > 0).all()


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_reference_free_losses_never_touch_the_reference(loss, monkeypatch):
    monkeypatch.setattr(common, "reference", lambda model: pytest.fail("the reference was used"))
    args = args_for(loss=loss)
    pairs = [dpo.encode_pair({"prompt": CHAT, "chosen": say("1 + 1 = 2"), "rejected": say("1 + 1 = 3")}, common.load_tokenizer(args.model), 64)]
    total, figures, hidden, ref_hidden = dpo.score_pairs(common.load_model(args.model), pairs, args, 0)
    assert ref_hidden is None and torch.isfinite(total)


def trl_dpo_loss(loss_type, logps, ref_chosen, ref_rejected, beta, length):
    from trl.trainer.dpo_trainer import DPOTrainer
    trainer = MagicMock()
    trainer.model.training, trainer.aux_loss_enabled, trainer.ld_alpha, trainer.precompute_ref_logps = True, False, None, True
    trainer.f_divergence_type, trainer.loss_types, trainer.loss_weights = "reverse_kl", [loss_type], [1.0]
    trainer.beta, trainer.use_weighting, trainer._total_train_tokens, trainer._tp_size = beta, False, 0, 1
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda tensor: tensor
    mask = torch.ones(len(logps), length + 1, dtype=torch.long)
    mask[:, 0] = 0
    outputs = SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps), is_top1=torch.zeros_like(logps).bool())
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)


@pytest.mark.parametrize("loss, trl_name", [("dpo", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_parity_with_trl_dpo(loss, trl_name):
    """The same loss (1e-5) and gradient norm (1e-4 relative) as TRL 1.16 on the same log-probs. TRL's ipo takes mean log-probs: so does ours here."""
    pytest.importorskip("trl")
    torch.manual_seed(0)
    length, pairs = 6, 5
    logps = (-torch.rand(2 * pairs, length) * 3).requires_grad_()
    ref_chosen, ref_rejected = -torch.rand(pairs) * 9, -torch.rand(pairs) * 9
    theirs = trl_dpo_loss(trl_name, logps, ref_chosen, ref_rejected, 0.2, length)
    (their_grad,) = torch.autograd.grad(theirs, logps)
    # TRL divides by completion_mask.sum(), which is `length` here
    scale = 1 / length if loss == "ipo" else 1
    chosen, rejected = (logps.sum(1) * scale).chunk(2)
    ours = dpo.preference_loss(chosen, rejected, ref_chosen * scale, ref_rejected * scale, None, None, loss, 0.2)[0].mean()
    (our_grad,) = torch.autograd.grad(ours, logps)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert our_grad.norm().item() == pytest.approx(their_grad.norm().item(), rel=1e-4)


def test_parity_with_trl_simpo_cpo_orpo():
    """SimPO and the preference terms of CPO and ORPO equal TRL's; ours add the NLL, TRL adds it elsewhere."""
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    torch.manual_seed(0)
    chosen, rejected, n, m = -torch.rand(5) * 9 - 1, -torch.rand(5) * 9 - 1, torch.full((5,), 4.0), torch.full((5,), 3.0)
    trainer = MagicMock()
    trainer.alpha, trainer.beta, trainer.simpo_gamma, trainer.label_smoothing, trainer.accelerator.device = 0.0, 2.0, 0.7, 0.0, torch.device("cpu")
    trainer.loss_type = "simpo"
    theirs = CPOTrainer.cpo_loss(trainer, chosen / n, rejected / m)[0]
    assert torch.allclose(dpo.preference_loss(chosen, rejected, None, None, n, m, "simpo", 2.0, gamma=0.7)[0], theirs, atol=1e-5)
    trainer.loss_type = "sigmoid"
    theirs = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0] - chosen
    assert torch.allclose(dpo.preference_loss(chosen, rejected, None, None, n, m, "cpo", 2.0)[0], theirs, atol=1e-5)
    theirs = -chosen / n - ORPOTrainer.odds_ratio_loss(trainer, chosen / n, rejected / m)[0]
    assert torch.allclose(dpo.preference_loss(chosen, rejected, None, None, n, m, "orpo", 2.0)[0], theirs, atol=1e-5)


# ---- data -------------------------------------------------------------------------------------------------

def test_the_usual_forms_of_a_pair_give_the_same_tokens():
    """Explicit and implicit prompt, prompt repeated in the answers, an empty prompt column."""
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = [{"prompt": CHAT, "chosen": say("2"), "rejected": say("3")},
            {"chosen": CHAT + say("2"), "rejected": CHAT + say("3")},
            {"prompt": CHAT, "chosen": CHAT + say("2"), "rejected": CHAT + say("3")},
            {"prompt": None, "chosen": CHAT + say("2"), "rejected": CHAT + say("3")}]
    first, *others = [dpo.encode_pair(row, tokenizer, 64) for row in rows]
    assert all(other == first for other in others)
    trained = [i for i, m in zip(first["chosen"], first["chosen_mask"]) if m]
    assert tokenizer.decode(trained) == "2<|im_end|>"
    assert first["prompt"] == common.encode_prompt(tokenizer, CHAT)


def test_only_the_answer_is_trained_in_a_conversation_with_system_and_earlier_turns():
    tokenizer = common.load_tokenizer("tiny/chat")
    prompt = [{"role": "system", "content": "Add."}, *CHAT, *say("2"), {"role": "user", "content": "What is 2 + 2?"}]
    pair = dpo.encode_pair({"prompt": prompt, "chosen": say("4"), "rejected": say("5")}, tokenizer, 200)
    for side, text in (("chosen", "4<|im_end|>"), ("rejected", "5<|im_end|>")):
        assert tokenizer.decode([i for i, m in zip(pair[side], pair[side + "_mask"]) if m]) == text


def test_strings_end_in_eos_and_share_their_prompt_as_tokens(shared):
    tokenizer = common.load_tokenizer(str(shared / "models/stories260K"))
    explicit = dpo.encode_pair({"prompt": "Once upon a time", "chosen": " there was a cat", "rejected": " there was a dog"}, tokenizer, 64)
    implicit = dpo.encode_pair({"chosen": "Once upon a time there was a cat", "rejected": "Once upon a time there was a dog"}, tokenizer, 64)
    assert explicit["chosen"] == implicit["chosen"] and explicit["chosen"][-1] == tokenizer.eos_token_id and explicit["chosen_mask"][-1] == 1
    assert tokenizer.decode(explicit["prompt"]).strip().endswith("Once upon a time")
    start = implicit["chosen_mask"].index(1)
    assert implicit["chosen"][:start] == implicit["rejected"][:start] and implicit["chosen"][start] != implicit["rejected"][start]


def test_truncation_keeps_the_end_of_the_prompt_and_never_empties_a_mask():
    """For every max_length: within it, the same prompt on both sides, some answer left, or the row is dropped as a whole."""
    tokenizer = common.load_tokenizer("tiny/chat")
    long = [{"role": "user", "content": "Add 1 and 2. " * 6}]
    row = {"prompt": long, "chosen": say("1 + 2 = 3 = 3 = 3"), "rejected": say("4")}
    whole = dpo.encode_pair(row, tokenizer, 1000)
    assert not whole["cut"]
    for max_length in range(2, len(whole["chosen"]) + 2):
        pair = dpo.encode_pair(row, tokenizer, max_length)
        if len(whole["prompt"]) >= max_length:
            assert pair is None
            continue
        assert len(pair["chosen"]) <= max_length and len(pair["rejected"]) <= max_length
        assert 1 in pair["chosen_mask"] and 1 in pair["rejected_mask"]
        assert pair["prompt"] == whole["prompt"][len(whole["prompt"]) - len(pair["prompt"]):]
        assert pair["chosen"][:len(pair["prompt"])] == pair["rejected"][:len(pair["prompt"])] == pair["prompt"]
        assert pair["cut"] == (len(whole["chosen"]) > max_length)


def test_collate_pads_from_lengths_though_pad_is_eos():
    tokenizer = common.load_tokenizer("tiny/base")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"prompt": CHAT, "chosen": say("1 + 1 = 2"), "rejected": say("3")}, {"prompt": CHAT, "chosen": say("2"), "rejected": say("1 + 1 = 11")}]
    pairs = [dpo.encode_pair(row, tokenizer, 64) for row in rows]
    batch = dpo.collate(pairs, tokenizer.pad_token_id, "cpu")
    sides = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    for row, ids in enumerate(sides):
        assert batch["attention_mask"][row].sum() == len(ids)
        # the template closes a row with eos and a newline: eos is real and trained though pad has the same id, the newline is real and not trained
        assert ids[-2] == tokenizer.eos_token_id and batch["loss_mask"][row, len(ids) - 2] == 1 and batch["loss_mask"][row, len(ids) - 1:].sum() == 0
        assert batch["input_ids"][row, :len(ids)].tolist() == ids


# ---- one batch is one batch -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    args = args_for()
    tokenizer = common.load_tokenizer(args.model)
    rows = dpo.load_rows(args.dataset, "train", 0, 0)[:8]
    torch.manual_seed(0)
    model = common.load_model(args.model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # away from the start, where half of the gradients are zero
    return SimpleNamespace(args=args, tokenizer=tokenizer, model=model, pairs=[dpo.encode_pair(row, tokenizer, 512) for row in rows])


def gradient(tiny, pairs, micro_batch_size):
    tiny.model.zero_grad()
    for i in range(0, len(pairs), micro_batch_size):
        loss = dpo.score_pairs(tiny.model, pairs[i:i + micro_batch_size], tiny.args, tiny.tokenizer.pad_token_id)[0]
        (loss / len(pairs)).backward()
    return torch.cat([p.grad.flatten() for p in tiny.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_accumulated_gradients_equal_the_big_batch(tiny, micro_batch_size):
    whole, parts = gradient(tiny, tiny.pairs, 8), gradient(tiny, tiny.pairs, micro_batch_size)
    assert whole.norm() > 0.01
    assert torch.allclose(whole, parts, atol=1e-5 * whole.norm().item())


def test_order_of_the_pairs_does_not_matter(tiny):
    whole, turned = gradient(tiny, tiny.pairs, 8), gradient(tiny, tiny.pairs[::-1], 8)
    assert torch.allclose(whole, turned, atol=1e-5 * whole.norm().item())


def test_padding_does_not_matter(tiny):
    """A long neighbour pads the others; their figures stay."""
    alone = dpo.score_pairs(tiny.model, tiny.pairs[:1], tiny.args, 0)[1]
    long = dict(tiny.pairs[1], chosen=tiny.pairs[1]["chosen"] * 3, chosen_mask=tiny.pairs[1]["chosen_mask"] * 3)
    both, other = (dpo.score_pairs(tiny.model, pairs, tiny.args, 0)[1] for pairs in ([tiny.pairs[0], long], [long]))
    assert torch.allclose(both - other, alone, atol=1e-3)


def test_the_loss_starts_at_log_2_with_a_tie_for_every_pair():
    args = args_for()
    tokenizer = common.load_tokenizer(args.model)
    pairs = [dpo.encode_pair(row, tokenizer, 512) for row in dpo.load_rows(args.dataset, "train", 0, 0)[:16]]
    figures = dict(zip(dpo.FIGURES, (dpo.score_pairs(common.load_model(args.model), pairs, args, 0)[1] / 16).tolist()))
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["margin"] == figures["chosen_reward"] == 0 and figures["accuracy"] == 0.5


# ---- whole runs -------------------------------------------------------------------------------------------

def run(tmp_path, name="run", **kwargs):
    kwargs = {"eval_size": 8, "max_new_tokens": 4, "batch_size": 8, "max_steps": 2, "save_every": 1} | kwargs
    dpo.train(dpo.Args(output_dir=str(tmp_path / name), **kwargs))
    return tmp_path / name


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_the_preference_and_leaves_what_it_should(tmp_path):
    """30 steps on the embedded data: held-out accuracy from a tie to above 0.8, and all files, the adapter loadable by peft alone."""
    folder = run(tmp_path, max_steps=30, batch_size=32, eval_size=64, eval_every=15)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["accuracy"] == 0.5 and summary["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["after"]["accuracy"] > 0.8 and summary["after"]["margin"] > 1 and summary["after"]["loss"] < 0.68
    for key in ("method", "model", "dataset", "steps", "seconds", "tokens_per_second", "peak_memory_gib", "device", "dtype"):
        assert summary[key] not in (None, ""), key
    logged = metrics_of(folder)
    assert [m["step"] for m in logged] == list(range(1, 31))
    wanted = {"loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logp", "rejected_logp", "kl", "grad_norm", "learning_rate",
              "tokens_per_second", "peak_memory_gib"}
    assert wanted <= set(logged[0]) and "eval_accuracy" in logged[14] and logged[0]["kl"] == 0 and logged[-1]["kl"] > 0
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    os.chdir(ROOT)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert torch.allclose(theirs, common.load_model(str(folder), trainable=False)(ids).logits, atol=1e-5)


def test_a_run_that_starts_from_an_adapter_has_it_as_its_reference(tmp_path):
    """The first step of the second run is again at log 2, though adapters off would be another model."""
    first = run(tmp_path, "first", max_steps=8, batch_size=16, eval_size=32)
    second = run(tmp_path, "second", model=str(first), dataset="tiny/data/preference_train.jsonl", max_steps=2)
    summary = json.loads((second / "summary.json").read_text())
    assert summary["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6) and summary["before"]["accuracy"] == 0.5
    assert json.loads((first / "summary.json").read_text())["after"]["loss"] < 0.69
    old, new = load_file(first / "adapter_model.safetensors"), load_file(second / "adapter_model.safetensors")
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)


def test_four_bit_on_cpu_trains(tmp_path):
    folder = run(tmp_path, load_in_4bit="on", max_steps=8, gradient_checkpointing="on", batch_size=16, eval_size=32)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["load_in_4bit"] is True and summary["gradient_checkpointing"] is True
    assert summary["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5) and summary["after"]["loss"] < 0.68


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "dpo"])
def test_every_loss_runs_and_raises_the_margin(tmp_path, loss):
    folder = run(tmp_path, loss=loss, max_steps=8, batch_size=16, eval_size=32)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["margin"] > summary["before"]["margin"]
    assert ("kl" in metrics_of(folder)[0]) == (loss not in dpo.REFERENCE_FREE)


def script(*flags, launcher=(sys.executable,)):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*launcher, str(ROOT / "dpo.py"), *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    """Killed between two savings, the run ends bit for bit like one that was never interrupted."""
    flags = ["--max-steps", "9", "--save-every", "4", "--eval-size", "8", "--batch-size", "16", "--max-new-tokens", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = script(*flags, "--output-dir", str(killed))
    while not (killed / "metrics.jsonl").exists() or len((killed / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "summary.json").exists()
    both = script("--resume", str(killed)), script(*flags, "--output-dir", str(whole))
    for process in both:
        assert process.wait() == 0, process.stdout.read()
    for a, b in zip(metrics_of(whole), metrics_of(killed), strict=True):
        for name in a.keys() - {"tokens_per_second", "peak_memory_gib"}:
            assert a[name] == b[name], (a["step"], name)
    old, new = load_file(whole / "adapter_model.safetensors"), load_file(killed / "adapter_model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads((whole / "summary.json").read_text())["after"] == json.loads((killed / "summary.json").read_text())["after"]


def test_two_processes_equal_one(tmp_path):
    """torchrun with two gloo processes gives the losses and gradient norms of one process, also with an uneven last batch."""
    flags = ["--max-steps", "4", "--eval-size", "9", "--batch-size", "7", "--micro-batch-size", "2", "--max-new-tokens", "2"]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533")
    both = script(*flags, "--output-dir", str(tmp_path / "one")), script(*flags, "--output-dir", str(tmp_path / "two"), launcher=launcher)
    for process in both:
        assert process.wait() == 0, process.stdout.read()
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in ("loss", "margin", "chosen_logp", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)


def test_a_second_default_run_takes_the_next_free_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [str(dpo.new_folder(None, "runs/dpo")) for _ in range(2)] == ["runs/dpo", "runs/dpo-2"]  # though the first run has not written a file yet
    (tmp_path / "runs/dpo/metrics.jsonl").write_text("{}\n")
    assert str(dpo.new_folder(None, "runs/dpo")) == "runs/dpo-3"
    assert "runs/dpo is in use: this run goes to runs/dpo-2" in capsys.readouterr().out
    assert (tmp_path / "runs/dpo/metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("place", ["file.txt/run", "/dev/null", "/proc/run"])
def test_a_folder_that_cannot_be_created_is_refused(place, tmp_path, refused):
    (tmp_path / "file.txt").write_text("mine")
    assert "--output-dir" in refused(dpo.new_folder, str(tmp_path / place), "runs/dpo") and (tmp_path / "file.txt").read_text() == "mine"


def test_unknown_flags_and_values_are_refused_in_one_line(refused, monkeypatch):
    for flags, words in ((["--bogus", "1"], "there is no flag --bogus"), (["--loss", "foo"], "invalid choice: 'foo'"), (["--batch-size", "x"], "invalid int value: 'x'")):
        monkeypatch.setattr(sys, "argv", ["dpo.py", *flags])
        assert words in refused(dpo.parse_args, dpo.Args, dpo.__doc__)


def test_what_another_script_or_a_kill_left_behind_does_not_confuse_resume(tmp_path, monkeypatch, refused):
    """args.json with flags of another script or cut short is refused; a last line of metrics.jsonl that was half written is done again."""
    folder = run(tmp_path, max_steps=3)
    whole = metrics_of(folder)
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--resume", str(folder)])
    state = torch.load(folder / "resume.pt", weights_only=True)
    torch.save(state | {"step": 2}, folder / "resume.pt")
    dpo.train(dpo.parse_args(dpo.Args, dpo.__doc__))
    assert [m["step"] for m in metrics_of(folder)] == [m["step"] for m in whole] == [1, 2, 3]
    (folder / "summary.json").unlink()
    for content in ('{"model": "tiny/chat", "lam": 0.9}', '{"model": "ti', ""):
        (folder / "args.json").write_text(content)
        assert "was not written by this script" in refused(dpo.parse_args, dpo.Args, dpo.__doc__)


def test_show_batch_prints_the_trained_tokens_in_green_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dpo.train(dpo.Args(show_batch=True))
    green = [part.split("\033[0m")[0] for part in capsys.readouterr().out.split("\033[32m")[1:]]
    assert "".join(green).count("<|im_end|>") == 2 and "user" not in "".join(green)
    assert list(tmp_path.iterdir()) == []


def test_metrics_go_to_a_tracker(tmp_path, monkeypatch):
    """wandb and trackio share init, log and finish; a stand-in with these records what it is sent."""
    calls = []
    tracker = SimpleNamespace(init=lambda **kw: calls.append(("init", kw)), log=lambda m, step: calls.append(("log", step, m)), finish=lambda: calls.append(("finish",)))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr(dpo.importlib.util, "find_spec", lambda name: name)
    run(tmp_path, track="trackio")
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"] and calls[1][2]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_gradient_of_a_step_is_that_of_the_mean_loss_and_is_clipped(tmp_path):
    """Eight pairs in micro-batches of three: loss and gradient norm of a step are those of one batch. Clipped to next to nothing, nothing moves."""
    logged = metrics_of(run(tmp_path, batch_size=8, micro_batch_size=3, max_steps=1))[0]
    torch.manual_seed(0)
    model, tokenizer = common.load_model("tiny/chat"), common.load_tokenizer("tiny/chat")
    rows = dpo.load_rows("tiny/data/preference_train.jsonl", "train", 0, 0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:8]
    loss = dpo.score_pairs(model, [dpo.encode_pair(rows[i], tokenizer, 512) for i in order], args_for(), tokenizer.pad_token_id)[0] / 8
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4) and logged["grad_norm"] == pytest.approx(norm, rel=1e-4)

    folder = run(tmp_path, "clipped", max_steps=1, max_grad_norm=1e-9, learning_rate=1e-2, warmup_ratio=0.0)
    moved = [w.abs().max().item() for name, w in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in name]
    assert 0 < max(moved) < 2e-3  # Adam divides by |g| + 1e-8


def test_the_learning_rate_rises_then_falls_and_no_step_is_for_nothing(tmp_path):
    """Eight steps with two of warm-up: 1/3 and 2/3 of the peak, then a cosine, which neither starts nor ends at 0."""
    rates = [m["learning_rate"] for m in metrics_of(run(tmp_path, max_steps=8, batch_size=2, warmup_ratio=0.25, learning_rate=1e-3, epochs=9))]
    assert rates == pytest.approx([1e-3 * min((n + 1) / 3, 0.5 + 0.5 * math.cos(math.pi * n / 8)) for n in range(8)])
    assert max(rates) > 0.8e-3 and min(rates) > 0


def test_a_loss_that_is_not_finite_stops_the_run_with_step_dtype_and_cause(tmp_path, refused):
    line = refused(run, tmp_path, learning_rate=1e8, max_steps=30, max_grad_norm=1e9, warmup_ratio=0)
    assert "step " in line and "float32" in line and "--learning-rate" in line


# ---- bad input --------------------------------------------------------------------------------------------

GOOD = {"prompt": CHAT, "chosen": say("2"), "rejected": say("3")}


@pytest.mark.parametrize("rows, words", [
    ([{"prompt": "x", "chosen": "y"}], "row 1: it has no rejected; it has prompt, chosen, and wanted are chosen, rejected"),
    ([GOOD, GOOD | {"rejected": say("2")}], "row 2: chosen equals rejected"),
    ([GOOD | {"chosen": 5}], "row 1: prompt, chosen and rejected must all be strings or all be lists"),
    ([GOOD | {"prompt": "text"}], "row 1: prompt, chosen and rejected must all be strings or all be lists"),
    ([GOOD | {"chosen": [{"role": "assistant", "text": "2"}]}], "row 1: message 2 must be an object with the strings role and content"),
    ([GOOD | {"prompt": CHAT + CHAT}], "row 1: roles out of order: message 2 is of 'user' after 'user'"),
    ([GOOD | {"prompt": say("hello")}], "row 1: roles out of order: message 1 is of 'assistant' after 'start'"),
    ([{"chosen": CHAT + say("2"), "rejected": [{"role": "user", "content": "What is 2 + 2?"}] + say("2")}], "row 1: chosen and rejected do not answer the same prompt"),
    ([{"chosen": "Yes.", "rejected": "No."}], "row 1: chosen and rejected do not answer the same prompt"),
    ([GOOD], "too few different prompts"),
])
def test_bad_rows_are_refused(rows, words, write_jsonl, tmp_path, refused):
    assert words in refused(run, tmp_path, dataset=write_jsonl(rows))


@pytest.mark.parametrize("content, words", [("", "is empty"), ('{"chosen": "a"}\n\n{"chosen": "b",}\n', "line 3, cannot be read"), ("[1]\n", "must hold one JSON object per row")])
def test_bad_files_are_refused(content, words, tmp_path, refused):
    (tmp_path / "bad.jsonl").write_text(content)
    assert words in refused(run, tmp_path, dataset=str(tmp_path / "bad.jsonl"))


def test_unknown_names_are_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nowhere/to-be-found" in refused(run, tmp_path, model="nowhere/to-be-found", dataset="tiny/data/preference_train.jsonl")
    assert "missing.jsonl" in refused(run, tmp_path, dataset="missing.jsonl")
    assert "nobody/nothing" in refused(run, tmp_path, dataset="nobody/nothing")


def test_prompts_longer_than_max_length_leave_nothing(tmp_path, refused):
    assert "--max-length 6" in refused(run, tmp_path, max_length=6)


@pytest.mark.parametrize("flags, words", [
    ({"beta": -1.0}, "--beta"), ({"learning_rate": 0.0}, "--learning-rate"), ({"batch_size": 0}, "--batch-size"), ({"label_smoothing": 0.7}, "--label-smoothing"),
    ({"warmup_ratio": 2.0}, "--warmup-ratio"), ({"loss": "ipo", "label_smoothing": 0.1}, "--label-smoothing belongs to --loss dpo"),
    ({"gamma": 0.5}, "--gamma belongs to --loss simpo"), ({"lora_rank": 0}, "--lora-rank"), ({"track": "wandb"}, "not installed"), ({"max_steps": -1}, "--max-steps"),
    ({"dataset": "pairs.jsonl", "eval_dataset": "pairs.jsonl"}, "--eval-dataset pairs.jsonl is also what is trained on"),
])
def test_bad_flags_are_refused(flags, words, tmp_path, refused):
    assert words in refused(run, tmp_path, **flags)


def test_a_folder_in_use_is_refused_and_stays_as_it_was(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("keep")
    assert "in use" in refused(run, tmp_path)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flags, words", [(["--resume", "nowhere"], "no run was started there"), (["--resume", "nowhere", "--beta", "1"], "leave all other flags out")])
def test_bad_resume_is_refused(flags, words, refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *flags])
    assert words in refused(dpo.parse_args, dpo.Args, dpo.__doc__)


@pytest.mark.parametrize("source", ["trl-lib/some", "teknium/OpenHermes-2.5"])
def test_rows_of_a_hub_dataset_that_cannot_be_used_are_dropped_and_counted(source, capsys):
    """Nobody can mend a dataset on the Hub: its bad rows must not end the headline command."""
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = [GOOD, GOOD | {"rejected": say("2")}, GOOD | {"rejected": say("5")}]
    kept = dpo.encode_rows(rows, lambda row: dpo.encode_pair(row, tokenizer, 64), ("chosen", "rejected"), source, 64)
    assert len(kept) == 2 and f"{source}, 3 rows: 2 within --max-length 64; 1 dropped, chosen equals rejected" in capsys.readouterr().out


# ---- real data --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["pref_hh_string.jsonl", "pref_hh_implicit_prompt.jsonl"])
def test_real_string_preferences_train_on_a_real_model(file, shared, tmp_path):
    folder = run(tmp_path, model=str(shared / "models/stories260K"), dataset=str(shared / "data" / file), micro_batch_size=8)
    assert metrics_of(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("file", ["pref_hh_conversational.jsonl", "pref_dpo_mix_conversational.jsonl"])
def test_real_message_preferences_become_masked_pairs(file, shared, tmp_path):
    """On the real Qwen2.5 base template: every row encodes, and the trained text is the answer and the end-of-turn token."""
    tokenizer = common.AutoTokenizer.from_pretrained(shared / "tokenizers/Qwen2.5-0.5B-Instruct")
    rows = dpo.load_rows(str(shared / "data" / file), "train", 0, 0)[:100]
    for row in rows:
        pair = dpo.encode_pair(row, tokenizer, 10**6)
        for side in ("chosen", "rejected"):
            trained = tokenizer.decode([i for i, m in zip(pair[side], pair[side + "_mask"]) if m])
            assert trained == row[side][0]["content"] + "<|im_end|>"


def test_json_and_parquet_hold_the_same_rows_as_jsonl(tmp_path, write_jsonl):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [GOOD, GOOD | {"rejected": say("4\u2028")}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + Path(write_jsonl(rows)).read_bytes())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in (write_jsonl(rows), tmp_path / "rows.json", tmp_path / "lines.json", tmp_path / "bom.jsonl", tmp_path / "rows.parquet"):
        assert dpo.load_rows(str(name), "train", 0, 0) == rows
