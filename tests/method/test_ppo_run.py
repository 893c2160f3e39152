"""PPO: whole steps of its loop by hand, what a run keeps and changes, 16 bits."""
import contextlib
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, metrics_of, run_args
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import common
import ppo

EOS = 2  # of the tiny models


# ---- whole steps by hand -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven prompts to train on and three that are held out, of unequal lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name in "train", "heldout":
        lines = (ROOT / f"tiny/data/prompt_{name}.jsonl").read_text().splitlines()
        Path(folder, name).with_suffix(".jsonl").write_text("\n".join(lines[:7]))
    return {"dataset": folder / "train.jsonl", "eval_dataset": folder / "heldout.jsonl",
            "eval_size": 3, "batch_size": 5, "max_steps": 2, "max_new_tokens": 6,
            "lora_rank": 4, "epsilon": 0.1, "beta": 0.3, "epochs": 3, "target_kl": 1e6}


def fixed_sample(model, tokenizer, prompts, copies, args, seed):
    """In place of `sample`: answers that follow from the prompt; some do not stop, some say pad."""
    answers = []
    for prompt in prompts:
        draw = random.Random(str(prompt))
        ids = [draw.randrange(3, 300) for _ in range(draw.randint(1, 6))]
        ids[0] = ids[0] if len(ids) > 3 else 0
        answers.append(ids if len(ids) > 5 else ids + [EOS])
    return answers


def watch(patch, answers=fixed_sample):
    """Keeps what a run was given and what it made."""
    seen = SimpleNamespace(rollouts=[], seeds=[], rows=[], heads={}, start={}, steps=[])
    rollout, gradients, update = ppo.rollout, ppo.minibatch_gradients, ppo.update
    add_role = common.add_role

    def keep_role(model, name, role, **options):
        seen.model = model
        seen.heads[role] = add_role(model, name, role, **options)
        seen.start |= {n: p.detach().clone() for n, p in model.named_parameters()}
        seen.start[role] = seen.heads[role].weight.detach().clone()
        return seen.heads[role]

    def keep_seed(model, tokenizer, prompts, copies, args, seed):
        seen.seeds.append(seed)
        return answers(model, tokenizer, prompts, copies, args, seed)

    def keep_rollout(roles, examples, *rest):
        batch, answers = rollout(roles, examples, *rest)
        prompts = [example["prompt"] for example in examples]
        seen.rollouts.append(list(zip(prompts, answers, strict=True)))
        return batch, answers

    def keep_rows(roles, batch, rows, *rest):
        seen.rows.append(rows.tolist())
        return gradients(roles, batch, rows, *rest)

    def keep_step(optimizer, scaler, rate):
        weights = optimizer.param_groups[0]["params"]
        before = [weight.detach().clone() for weight in weights]
        logged = update(optimizer, scaler, rate)
        same = [torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
        seen.steps.append(SimpleNamespace(moved=not all(same), logged=logged))
        return logged

    patch.setattr(common, "add_role", keep_role)
    patch.setattr(ppo, "sample", keep_seed)
    patch.setattr(ppo, "rollout", keep_rollout)
    patch.setattr(ppo, "minibatch_gradients", keep_rows)
    patch.setattr(ppo, "update", keep_step)
    return seen


SHORT = {"epochs": 1, "learning_rate": 3e-3, "micro_batch_size": 5}


def run(folder, **settings):
    """A run of the script, its metrics and its summary."""
    ppo.train(run_args(ppo, output_dir=folder, **settings))
    return metrics_of(folder), json.loads(Path(folder, "summary.json").read_text())


@contextlib.contextmanager
def doubles():
    """Everything in float64: what is left between two ways to compute a number is no rounding."""
    def norm(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(common, "choose_dtype", lambda device: torch.float64)
        patch.setattr(Qwen2RMSNorm, "forward", norm)  # transformers' own is in fp32
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(torch.float32)


def matrices(named, role):
    """(A, B) of a role by the name of the plain weight W that they change to W + 2BA."""
    found = {}
    for name in named:
        if f".lora_A.{role}" in name:
            layer = name.split(".lora_A")[0].removeprefix("base_model.model.")
            pair = named[name], named[name.replace("lora_A", "lora_B")]
            found[layer + ".weight"] = [x.detach().double().clone() for x in pair]
    return found


def read(plain, adapter, pair):
    """Logits [T, V] and hidden states [T, D] of one prompt and answer, without any padding."""
    weights = {name: plain.get_parameter(name) + 2 * b @ a for name, (a, b) in adapter.items()}
    options = {"input_ids": torch.tensor([pair[0] + pair[1]]), "output_hidden_states": True}
    out = torch.func.functional_call(plain, weights, (), options)
    return out.logits[0], out.hidden_states[-1][0]


def answer_logps(plain, adapter, pair):
    """Log-probs of the answer's tokens at temperature 1.5."""
    prompt, answer = pair
    table = (read(plain, adapter, pair)[0] / 1.5).log_softmax(-1)[len(prompt) - 1:-1]
    return table[range(len(answer)), answer]


def describe_by_hand(plain, policy, reward, score, pairs):
    """What a rollout is worth."""
    with torch.no_grad():
        scores = [(read(plain, reward, pair)[1][-1] @ score).item() for pair in pairs]
        logs = [answer_logps(plain, policy, pair) - answer_logps(plain, {}, pair) for pair in pairs]
    stopped = [float(answer[-1] == EOS) for _, answer in pairs]
    columns = {"reward": scores, "kl": [log.sum().item() for log in logs], "stopped": stopped,
               "length": [len(answer) for _, answer in pairs]}
    return {name: sum(column) / len(pairs) for name, column in columns.items()}


def advantages_by_hand(answers):
    """Fills in advantages, returns and white advantages; returns the explained variance."""
    for x in answers:
        x.rewards = -0.3 * (x.old - x.ref)
        x.rewards[-1] += x.score - (0 if x.stopped else 0.8)
        values = torch.cat([x.values, torch.zeros(1)])
        deltas = x.rewards + 0.9 * values[1:] - values[:-1]
        length = len(deltas)
        sums = [sum(0.63 ** (i - t) * deltas[i] for i in range(t, length)) for t in range(length)]
        x.advantages = torch.stack(sums)
        x.returns = x.advantages + x.values
    all_of_them = torch.cat([x.advantages for x in answers])
    for x in answers:
        x.white = (x.advantages - all_of_them.mean()) / all_of_them.std(correction=0)
    returns = torch.cat([x.returns for x in answers])
    values = torch.cat([x.values for x in answers])
    return (1 - (returns - values).var() / returns.var()).item()


def minibatch_by_hand(plain, policy, critic, head, answers):
    """The loss whose gradient is followed, and the figures: means over the tokens."""
    columns = {name: [] for name in ppo.FIGURES}
    for x in answers:
        new = answer_logps(plain, policy, x.pair)
        values = read(plain, critic, x.pair)[1][len(x.pair[0]) - 1:-1] @ head
        for t in range(len(new)):
            a, ratio = x.white[t], (new[t] - x.old[t]).exp()
            binds = ratio > 1.1 if a > 0 else ratio < 0.9
            columns["policy_loss"].append(-(1.1 if a > 0 else 0.9) * a if binds else -ratio * a)
            change = (values[t] - x.values[t]).clamp(-0.1, 0.1)
            errors = torch.stack([values[t], x.values[t] + change]) - x.returns[t]
            columns["value_loss"].append(errors.square().max() / 2)
            columns["sampler_kl"].append(ratio - 1 - ratio.log())
            columns["clip_fraction"].append(binds.double())
            columns["entropy"].append(-new[t])
            columns["ratio_error"].append((ratio - 1).abs())
    figures = {name: torch.stack(column).mean() for name, column in columns.items()}
    loss = figures["policy_loss"] + 0.7 * figures["value_loss"]
    return loss, {name: value.item() for name, value in figures.items()}


def train_by_hand(seen):
    """The two steps of a run, from its weights, the fixed answers and who is in which minibatch."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "tiny/chat", dtype=torch.float64).requires_grad_(False)
    file = load_file(ROOT / "tiny/reward/adapter_model.safetensors")
    reward, score = matrices(file, "weight"), file["base_model.model.score.weight"][0].double()
    policy, critic, head = matrices(seen.start, "default"), matrices(file, "weight"), score.clone()
    weights = [*itertools.chain(*policy.values(), *critic.values()), head]
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights])
    hand = SimpleNamespace(policy=policy, critic=critic, head=head, metrics=[], kl_of_epochs=[])
    hand.before = describe_by_hand(plain, policy, reward, score, seen.rollouts[0])
    minibatches = iter(seen.rows)
    for pairs, rate in zip(seen.rollouts[1:-1], (2e-4, 1e-4), strict=True):
        metrics = describe_by_hand(plain, policy, reward, score, pairs)
        answers = []
        with torch.no_grad():
            for pair in pairs:
                values = read(plain, critic, pair)[1][len(pair[0]) - 1:-1] @ head
                answers.append(SimpleNamespace(
                    pair=pair, old=answer_logps(plain, policy, pair), values=values,
                    ref=answer_logps(plain, {}, pair), stopped=pair[1][-1] == EOS,
                    score=read(plain, reward, pair)[1][-1] @ score))
        metrics["explained_variance"] = advantages_by_hand(answers)
        figures = []
        for rows in itertools.islice(minibatches, 6):
            part = [answers[row] for row in rows]
            loss, row = minibatch_by_hand(plain, policy, critic, head, part)
            figures.append(row)
            gradients = torch.autograd.grad(loss, weights)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient / max(1, norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        metrics |= {name: sum(x[name] for x in figures) / 6 for name in ppo.FIGURES}
        metrics["ratio_error"] = figures[0]["ratio_error"]
        kl = [x["sampler_kl"] for x in figures]
        hand.kl_of_epochs.append([(kl[i] + kl[i + 1]) / 2 for i in (0, 2, 4)])
        hand.metrics.append(metrics | {"grad_norm": norm, "learning_rate": rate, "updates": 6})
    hand.after = describe_by_hand(plain, policy, reward, score, seen.rollouts[-1])
    return hand


BY_HAND = {"gamma": 0.9, "lam": 0.7, "temperature": 1.5, "minibatches": 2, "value_weight": 0.7,
           "missing_eos_penalty": 0.8, "learning_rate": 2e-4, "seed": 3}
WHOLE = {"micro_batch_size": 5}
ONES = {"micro_batch_size": 1, "sample_batch_size": 2}
CHECKPOINTED_THREES = {"micro_batch_size": 3, "gradient_checkpointing": "on"}


@pytest.fixture(scope="module")
def first_run(data, tmp_path_factory):
    """A run in float64, what it saw, and the same by hand."""
    with doubles() as patch:
        seen = watch(patch)
        folder = tmp_path_factory.mktemp("first") / "run"
        seen.metrics, seen.summary = run(folder, **data, **BY_HAND, **WHOLE)
    with doubles():
        return seen, train_by_hand(seen)


@pytest.mark.parametrize("way", [WHOLE, ONES, CHECKPOINTED_THREES], ids=str)
def test_two_steps_of_the_loop_are_those_by_hand(way, first_run, data, tmp_path):
    """Each logged number and each weight, however the batch is divided or checkpointed."""
    seen, hand = first_run
    if way != WHOLE:
        with doubles() as patch:
            seen = watch(patch)
            seen.metrics, seen.summary = run(tmp_path / "run", **data, **BY_HAND, **way)
    assert (seen.rollouts, seen.rows) == (first_run[0].rollouts, first_run[0].rows)
    checkpointing = common.causal_lm(seen.model).is_gradient_checkpointing
    assert checkpointing == ("gradient_checkpointing" in way)
    assert seen.model.training  # otherwise it would not be used
    for got, wanted in zip(seen.metrics, hand.metrics, strict=True):
        assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert seen.summary["before"] == pytest.approx(hand.before, rel=1e-6, abs=1e-9)
    assert seen.summary["after"] == pytest.approx(hand.after, rel=1e-6)
    named = dict(seen.model.named_parameters())
    for role in "policy", "critic":
        got = matrices(named, {"policy": "default"}.get(role, role))
        for name, pair in getattr(hand, role).items():
            assert torch.allclose(got[name][0], pair[0], atol=1e-9)
            assert torch.allclose(got[name][1], pair[1], atol=1e-9)
    assert torch.allclose(seen.heads["critic"].weight[0], hand.head, atol=1e-9)
    frozen = [n for n, p in named.items() if not p.requires_grad]
    assert all(torch.equal(named[n], seen.start[n]) for n in frozen)


def test_the_run_by_hand_is_a_telling_one(first_run):
    """Every part of the method had something to do in it; prompts come once an epoch."""
    seen, hand = first_run
    for metrics in hand.metrics:
        assert 0 < metrics["clip_fraction"] < 1 and 0 < metrics["stopped"] < 1
    assert hand.metrics[1]["kl"] != 0 and hand.metrics[1]["grad_norm"] > 1
    before, first, second, after = seen.rollouts
    assert before == after and len({len(prompt) for prompt, _ in first}) > 2
    prompts = [tuple(prompt) for prompt, _ in first + second]
    assert len(set(prompts[:7])) == 7 and set(prompts[7:]) < set(prompts[:7])
    assert not set(prompts) & {tuple(prompt) for prompt, _ in before}
    for i in range(0, 12, 2):
        assert sorted(seen.rows[i] + seen.rows[i + 1]) == [0, 1, 2, 3, 4]
    assert len({str(rows) for rows in seen.rows[::2]}) == 6


def test_target_kl_ends_the_epochs(first_run, data, tmp_path):
    """After the first epoch whose own mean is beyond it: here the second of three."""
    kl = first_run[1].kl_of_epochs[0]
    assert kl[0] < 0.9 * kl[1]
    settings = data | BY_HAND | WHOLE | {"max_steps": 1, "target_kl": 0.99 * kl[1]}
    with doubles() as patch:
        watch(patch)
        metrics, _ = run(tmp_path / "run", **settings)
    assert metrics[0]["updates"] == 4


# ---- whole runs ----------------------------------------------------------------------------------

def test_the_ratio_is_1_on_new_samples_and_not_after(data, tmp_path, monkeypatch):
    """The policy that sampled is the one compared with, at the same temperature; seeds differ."""
    away, policy_loss = [], ppo.policy_loss

    def keep(logps, old_logps, *rest):
        away.append((logps - old_logps).abs().max().item())
        return policy_loss(logps, old_logps, *rest)
    monkeypatch.setattr(ppo, "policy_loss", keep)
    seen = watch(monkeypatch, ppo.sample)
    settings = data | {"temperature": 1.3, "learning_rate": 3e-3, "minibatches": 2, "epochs": 2}
    run(tmp_path / "run", **settings, sample_batch_size=2)
    assert [x < 1e-4 for x in away] == [True, False, False, False] * 2, away
    assert seen.seeds[:2] == seen.seeds[-2:]  # before and after
    assert len(set(seen.seeds[:-2])) == len(seen.seeds) - 2 == 8


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A short run with real answers, and what it saw."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch, ppo.sample)
        seen.metrics, seen.summary = run(folder, **data | SHORT)
    seen.folder = folder
    return seen


def test_one_adapter_is_saved_and_peft_alone_reproduces_the_policy(finished):
    """In fp32, without base, critic or reward weights, and what goes with it."""
    file = load_file(finished.folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in file.values()} == {torch.float32}
    assert len(file) == 70 and all("lora_" in name for name in file)
    assert not any(word in name for name in file for word in ("critic", "reward", "score"))
    named = dict(finished.model.named_parameters())
    for name, weight in file.items():
        assert torch.equal(weight, named[name.replace(".weight", ".default.weight")])
    names = {path.name for path in finished.folder.iterdir()}
    assert {"args.json", "metrics.jsonl", "summary.json", "adapter_config.json"} < names
    assert not names & {"resume.pt", "model.safetensors", "critic", "reward"}
    with contextlib.chdir(ROOT):
        alone = peft.AutoPeftModelForCausalLM.from_pretrained(finished.folder).double()
    kl = []
    for prompt, answer in finished.rollouts[-1]:
        ids, logps = torch.tensor([prompt + answer]), []
        for bare in contextlib.nullcontext(), alone.disable_adapter():
            with torch.no_grad(), bare:
                table = alone(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            logps.append(table[range(len(answer)), answer].sum().item())
        kl.append(logps[0] - logps[1])
    assert finished.summary["after"]["kl"] == pytest.approx(sum(kl) / 3, abs=1e-4)
    assert abs(sum(kl)) > 0.05 and finished.summary["before"]["kl"] == 0


def test_a_run_from_an_adapter_is_its_own_reference(finished, data, tmp_path):
    """Its KL starts at 0, though the base alone would be another policy; the copy stays."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        settings = data | SHORT | {"max_steps": 1, "model": finished.folder}
        metrics, summary = run(tmp_path / "run", **settings)
    assert metrics[0]["kl"] == summary["before"]["kl"] == 0 != summary["after"]["kl"]
    start = load_file(finished.folder / "adapter_model.safetensors")
    named = dict(seen.model.named_parameters())
    for name, weight in start.items():
        assert torch.equal(named[name.replace(".weight", ".reference.weight")], weight)
        assert not torch.equal(named[name.replace(".weight", ".default.weight")], weight)
    assert load_file(tmp_path / "run/adapter_model.safetensors").keys() == start.keys()


def assert_same_run(finished, folder, summary):
    """Bit for bit, but for the clock."""
    for a, b in zip(finished.metrics, metrics_of(folder), strict=True):
        assert all(a[name] == b[name] for name in a if "seconds" not in name)
    one, two = [load_file(x / "adapter_model.safetensors") for x in (finished.folder, folder)]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert summary["after"] == finished.summary["after"]


def test_evaluation_changes_nothing(finished, data, tmp_path, monkeypatch):
    """A run that never looked at its held-out prompts before it trained is the same run."""
    state = {"step": 0, "metrics": [], "samples": [], "before": finished.summary["before"]}
    monkeypatch.setattr(ppo, "restore", lambda *args: state)
    _, summary = run(tmp_path / "run", **data | SHORT)
    assert_same_run(finished, tmp_path / "run", summary)


def test_learning_rate_0_moves_nothing(data, tmp_path, monkeypatch):
    """All that moves a weight is scaled by the rate."""
    seen = watch(monkeypatch)
    monkeypatch.setattr(ppo, "learning_rate", lambda step, steps, peak: 0.0)
    _, summary = run(tmp_path / "run", **data | SHORT | {"max_steps": 1})
    assert summary["before"] == summary["after"] and not any(x.moved for x in seen.steps)
    assert all(x.logged["grad_norm"] > 0 for x in seen.steps) and len(seen.steps) == 2


def test_a_reward_function_leaves_the_critic_new(data, tmp_path, monkeypatch):
    """The function's mean is logged; there is no reward role, and the critic starts at 0."""
    seen = watch(monkeypatch)
    path = tmp_path / "rewards.py"
    path.write_text("def length(prompts, completions, answer, **columns):\n"
                    "    return [len(text) + float(x) for text, x in zip(completions, answer)]\n")
    settings = data | SHORT | {"max_steps": 1, "reward": f"{path}:length"}
    metrics, _ = run(tmp_path / "run", **settings)
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = common.load_rows(str(data["dataset"]), "train", 9, 0)
    right = {tuple(common.encode_prompt(tokenizer, row["prompt"])): row["answer"] for row in rows}
    scores = []
    for prompt, answer in seen.rollouts[1]:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        scores.append(len(text) + float(right[tuple(prompt)]))
    assert metrics[0]["reward"] == pytest.approx(sum(scores) / 5)
    assert seen.heads.keys() == {"critic"} and (seen.start["critic"] == 0).all()
    assert seen.heads["critic"].weight.any()


# ---- 16 bits -------------------------------------------------------------------------------------

def plant_overflow(monkeypatch):
    """The first backward pass of the policy gives gradients that are not finite."""
    policy_loss, calls = ppo.policy_loss, []

    def overflowing(*args):
        loss, clipped = policy_loss(*args)
        factor = 1 if calls else math.inf
        calls.append(factor)
        return factor * loss, clipped
    monkeypatch.setattr(ppo, "policy_loss", overflowing)


def sixteen_bits(monkeypatch, dtype):
    """The CPU computes as a GPU of that number format would."""
    monkeypatch.setattr(common, "choose_dtype", lambda device: dtype)
    monkeypatch.setattr(common, "autocast", lambda model: torch.autocast("cpu", dtype))


def test_an_overflow_skips_one_step_and_halves_the_scale(data, tmp_path, monkeypatch):
    """fp16: no weight changes in it, it is logged, and the run goes on in fp32 weights."""
    sixteen_bits(monkeypatch, torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    monkeypatch.setattr(common, "grad_scaler", lambda model: scaler)
    plant_overflow(monkeypatch)
    seen = watch(monkeypatch)
    settings = data | SHORT | {"minibatches": 1}
    metrics, summary = run(tmp_path / "run", **settings)
    assert [x.moved for x in seen.steps] == [False, True]
    assert [x["loss_scale"] for x in metrics] == [32.0, 32.0]
    assert metrics[0]["grad_norm"] is None and 0 < metrics[1]["grad_norm"] < 100
    assert summary["dtype"] == "torch.float16" and metrics[1]["kl"] == 0
    trained = [p for p in seen.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} == {seen.heads["critic"].weight.dtype}
    file = load_file(tmp_path / "run/adapter_model.safetensors")
    assert {weight.dtype for weight in file.values()} == {torch.float32}


def test_without_a_scaler_an_overflow_ends_the_run(data, tmp_path, monkeypatch, refused):
    """bf16 has the range of fp32: what is not finite there will not be at a smaller scale."""
    sixteen_bits(monkeypatch, torch.bfloat16)
    plant_overflow(monkeypatch)
    line = refused(run, tmp_path / "run", **data)
    assert "--learning-rate" in line and "gradient" in line


def test_the_loss_scale_changes_no_number(finished, data, tmp_path, monkeypatch):
    """Gradients are unscaled before they are clipped, and both losses are scaled alike."""
    monkeypatch.setattr(common, "grad_scaler", lambda model: torch.amp.GradScaler("cpu"))
    metrics, summary = run(tmp_path / "run", **data | SHORT)
    for got, wanted in zip(metrics, finished.metrics, strict=True):
        assert got["loss_scale"] == 2 ** 16 and wanted["loss_scale"] == 1
        for name in *ppo.FIGURES, "grad_norm", "explained_variance", "kl":
            assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert summary["after"] == pytest.approx(finished.summary["after"], rel=1e-4)
