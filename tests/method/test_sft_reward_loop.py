"""The loops of sft.py, reward_model.py and prm.py, which are alike, against numbers by hand."""
import json
import math
import multiprocessing
import os
from pathlib import Path

import filelock
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, metrics_of, run_args
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import prm
import reward_model
import sft

SCRIPTS = pytest.mark.parametrize("script", [sft, reward_model, prm], ids=lambda x: x.__name__)
LOSS = {sft: "sft_loss", reward_model: "reward_loss", prm: "step_losses"}
SCORE = {sft: "batch_loss", reward_model: "comparison_losses", prm: "solution_losses"}
TASK = {sft: "CAUSAL_LM", reward_model: "SEQ_CLS", prm: "SEQ_CLS"}
CLOCK = {"seconds", "rollout_seconds", "tokens_per_second", "peak_memory_gib"}


def ask(text):
    return [{"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


def rows_of(script, count):
    """Rows of very different lengths; every second pair has a margin, most solutions an error."""
    rows = []
    for i in range(count):
        prompt = ask(f"Add {i}" + " and 1" * (i % 4))
        good, bad = say(f"{i} + {i % 4}" + " = 7" * (i % 3)), say(f"{i} + 1" + " = 8" * (i % 5))
        if script is sft:
            rows.append({"messages": prompt + good + (ask("And 3?") + say("3") if i % 2 else [])})
        elif script is prm:
            steps = [f"{i} + {step}" + " = 7" * (i % 3) for step in range(1 + i % 4)]
            labels = [(i + step) % 3 > 0 for step in range(len(steps))]
            rows.append({"prompt": prompt, "completions": steps, "labels": labels})
        else:
            margin = {"margin": 1 + i / 8} if i % 2 else {}
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad} | margin)
    return rows


def write(folder, name, rows):
    path = Path(folder, name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(script, folder, **flags):
    """Three steps, the last of one row alone, unless the flags say otherwise."""
    folder.mkdir(exist_ok=True)
    rows = rows_of(script, 15)
    flags = {"dataset": write(folder, "rows.jsonl", rows[:11]), "epochs": 1, "batch_size": 5,
             "eval_dataset": write(folder, "held_out.jsonl", rows[11:]), "eval_size": 4,
             "micro_batch_size": 3, "output_dir": folder / "run"} | flags
    if script is sft:
        flags = {"max_new_tokens": 2} | flags
    elif script is reward_model:
        flags = {"centering": 0.05} | flags
    return run_args(script, **flags)


class Run:
    """A run of `train`: what it logged and saved, and what was seen of it on the way."""

    def __init__(self, script, args, change=None):
        self.batches, self.weights, self.evaluated = [[]], [], []
        update, score = script.update, getattr(script, SCORE[script])

        def seen_score(model, examples, *rest):
            if torch.is_grad_enabled():
                self.batches[-1] += examples
            else:
                self.evaluated += examples
            return score(model, examples, *rest)

        def seen_update(optimizer, scaler, rate):
            trained = optimizer.param_groups[0]["params"]
            if not self.weights:
                self.weights.append([w.detach().clone() for w in trained])
            metrics = update(optimizer, scaler, rate)
            self.weights.append([w.detach().clone() for w in trained])
            self.batches.append([])
            return metrics

        with pytest.MonkeyPatch.context() as patch:
            # a process may run it again
            patch.setattr(filelock.FileLock, "acquire", lambda *args, **kwargs: None)
            patch.setattr(script, "update", seen_update)
            patch.setattr(script, SCORE[script], seen_score)
            if change:
                change(patch, self)
            script.train(args)
        self.batches.pop()
        self.folder = Path(args.output_dir)
        self.read()

    def read(self):
        self.metrics = metrics_of(self.folder)
        self.summary = json.loads((self.folder / "summary.json").read_text())
        file = "adapter_model" if (self.folder / "adapter_model.safetensors").exists() else "model"
        self.saved = load_file(self.folder / f"{file}.safetensors")

    def numbers(self, but=()):
        """All that must not change when something does that must not matter."""
        return [{k: x for k, x in m.items() if k not in (*CLOCK, *but)} for m in self.metrics]


def same(one, other):
    """The same weights, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = one.values(), other.values()
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- by hand -------------------------------------------------------------------------------------

def sft_by_hand(model, rows, args):
    """−Σ log π / N, one conversation after the other, from all logits."""
    total, trained = 0.0, 0
    for row in rows:
        ids = row["tokens"]["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logps = logits - logits.exp().sum(-1, keepdim=True).log()
        for t in range(1, len(ids)):
            if row["tokens"]["loss_mask"][t]:
                total -= logps[t - 1, ids[t]]
                trained += 1
    loss = total / trained
    return loss, {"loss": loss.item()}


def reward_by_hand(model, pairs, args):
    """Bradley and Terry with margin and centering, one sequence after the other."""
    losses, rewards, right, margins = [], [], 0.0, []
    for pair in pairs:
        chosen, rejected = (model(input_ids=torch.tensor([pair[side]["input_ids"]])).logits[0, 0]
                            for side in ("chosen", "rejected"))
        won = 1 / (1 + torch.exp(rejected - chosen + pair["margin"]))
        losses.append(-torch.log(won) + args.centering * (chosen + rejected) ** 2)
        right += (1 + torch.sign(chosen - rejected).item()) / 2
        margins.append((chosen - rejected).item())
        rewards += [chosen.item(), rejected.item()]
    loss = sum(losses) / len(losses)
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return loss, {"loss": loss.item(), "accuracy": right / len(pairs), "reward": mean,
                  "margin": sum(margins) / len(margins), "reward_spread": spread}


def steps_by_hand(model, examples, args):
    """The mean over all steps of −log p(label); a step is the end of a shorter sequence."""
    losses, agreed, firsts, verdicts = [], 0, [], [0, 0, 0]
    for example in examples:
        solution = example["solution"]
        logits = [model(input_ids=torch.tensor([solution["input_ids"][:end + 1]])).logits[0, 0]
                  for end in solution["step_ends"]]
        chances = [(1 / (1 + torch.exp(-logit))) for logit in logits]
        said = [p.item() >= 0.5 for p in chances] + [False]  # as if a wrong step came at the end
        true = [label == 1 for label in solution["labels"]] + [False]
        for p, verdict, label in zip(chances, said[:-1], true[:-1], strict=True):
            losses.append(-torch.log(p if label else 1 - p))
            agreed += verdict == label
        firsts.append((said.index(False), true.index(False), len(logits)))
        right = firsts[-1][1] == len(logits)
        for i, p in enumerate([min(chances), math.prod(chances), chances[-1]]):
            verdicts[i] += (p.item() >= 0.5) == right
    hits = sum(said == true < count for said, true, count in firsts)
    flagged = sum(said < count for said, _, count in firsts)
    wrong = sum(true < count for _, true, count in firsts)
    loss = sum(losses) / len(losses)
    low, product, last = (n / len(examples) for n in verdicts)
    return loss, {"loss": loss.item(), "step_accuracy": agreed / len(losses),
                  "precision": hits / max(flagged, 1), "recall": hits / max(wrong, 1),
                  "f1": 2 * hits / max(flagged + wrong, 1), "accuracy_min": low,
                  "accuracy_product": product, "accuracy_last": last}


BY_HAND = {sft: sft_by_hand, reward_model: reward_by_hand, prm: steps_by_hand}


def train_by_hand(script, args, batches):
    """Clipped gradients and Adam in float64; what should be logged, and the trained weights."""
    torch.manual_seed(0)
    model = common.load_model(args.model, lora_rank=args.lora_rank, task=TASK[script]).double()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    start = {name: p.detach().clone() for name, p in weights.items()}
    logged = []
    # of three steps none is warm-up, and the cosine falls through 1, 3/4 and 1/4
    for step, (batch, share) in enumerate(zip(batches, (1.0, 0.75, 0.25), strict=True), 1):
        loss, figures = BY_HAND[script](model, batch, args)
        gradients = torch.autograd.grad(loss, weights.values())
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for name, g in zip(weights, gradients, strict=True):
            g = g / max(1.0, norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean = first[name] / (1 - 0.9**step)
            size = (second[name] / (1 - 0.999**step)).sqrt()
            weights[name].data -= share * args.learning_rate * mean / (size + 1e-8)
        logged.append(figures | {"grad_norm": norm, "learning_rate": share * args.learning_rate})
    return logged, start, {name: p.detach() for name, p in weights.items()}


def assert_trained_as_by_hand(run, by_hand):
    """Every figure logged, and how far the run has moved the weights that it saved."""
    logged, start, weights = by_hand
    for line, expected in zip(run.metrics, logged, strict=True):
        shown = {name: line[name] for name in expected}
        assert shown == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(run.saved) == len(weights)
    moved = far = 0.0
    for name, weight in weights.items():
        file_name = name.replace(".modules_to_save", "").replace(".default", "")
        moved += (weight - start[name]).square().sum().item()
        far += (run.saved[file_name].double() - weight).square().sum().item()
    assert moved > 0 and far < 1e-6 * moved  # within a thousandth of the way


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs that several tests look at, and what they should be by hand; each made once."""
    made = {}

    def get(script, micro_batch_size=3):
        if (script, micro_batch_size) not in made:
            folder = tmp_path_factory.mktemp("run")
            args = arguments(script, folder, micro_batch_size=micro_batch_size)
            run = made[script, micro_batch_size] = Run(script, args)
            if script not in made:
                made[script] = train_by_hand(script, args, run.batches)
        return made[script, micro_batch_size], made[script]

    return get


@SCRIPTS
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_the_loop_equals_numbers_by_hand(runs, script, micro_batch_size):
    """Loss, figures, gradient norm, rate, weights: float64, full logits, any micro-batches."""
    run, by_hand = runs(script, micro_batch_size)
    assert [len(batch) for batch in run.batches] == [5, 5, 1]
    norms = [line["grad_norm"] for line in by_hand[0]]
    assert max(norms) > 1 and (script is not reward_model or min(norms) < 1), norms  # of clipping
    assert_trained_as_by_hand(run, by_hand)


def test_training_all_weights_equals_numbers_by_hand_and_saves_a_plain_model(tmp_path):
    """With --lora-rank 0 the head is trained too, and tied to the embeddings."""
    args = arguments(sft, tmp_path, lora_rank=0)
    run = Run(sft, args)
    assert_trained_as_by_hand(run, train_by_hand(sft, args, run.batches))
    assert not list(run.folder.glob("adapter*"))
    plain = AutoModelForCausalLM.from_pretrained(run.folder)
    assert plain.dtype == torch.float32 and not same(run.weights[0], run.weights[-1])
    assert same(run.weights[-1], list(plain.parameters()))


def one_process(script, args, rank, store):
    common.RANK, common.WORLD = rank, 2
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    script.train(args)
    os._exit(0)  # without pytest's end


@SCRIPTS
def test_two_processes_equal_numbers_by_hand(runs, script, tmp_path):
    """Also in the last step, whose single row leaves the second process without any."""
    run, by_hand = runs(script)
    args = arguments(script, tmp_path)
    processes = []
    for rank in range(2):
        more = (script, args, rank, tmp_path / "store")
        processes.append(multiprocessing.get_context("fork").Process(target=one_process, args=more))
        processes[-1].start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    two = Run.__new__(Run)
    two.folder = tmp_path / "run"
    two.read()
    assert_trained_as_by_hand(two, by_hand)
    for when in "before", "after":
        assert two.summary[when] == pytest.approx(run.summary[when], rel=1e-3, abs=1e-5)


# ---- what is trained, what is held out -----------------------------------------------------------

@SCRIPTS
def test_an_epoch_is_all_rows_once_and_held_out_prompts_are_in_none(script, tmp_path):
    """Each prompt has two rows; no order is that of another epoch or another seed."""
    rows = []
    for row in rows_of(script, 6):
        answers = ("messages",) if script is sft else ("chosen", "rejected")
        other = {side: row[side][:-1] + say("other " + side) for side in answers if side in row}
        if script is prm:
            other = {"completions": row["completions"][:-1] + ["another step"]}
        rows += [row, row | other]
    orders = []
    for seed in 0, 1:
        args = arguments(script, tmp_path, dataset=write(tmp_path, "twice.jsonl", rows), epochs=2,
                         eval_size=2, batch_size=1, seed=seed, output_dir=tmp_path / str(seed))
        del args.eval_dataset
        args.eval_dataset = None
        run = Run(script, args)
        key = [json.dumps(batch[0]) for batch in run.batches]
        size = len(key) // 2
        held_out = [json.dumps(x) for x in run.evaluated]
        assert sorted(key[:size]) == sorted(key[size:]) and len(set(key[:size])) == size
        assert len(set(held_out)) == 2 and sorted(held_out[:2]) == sorted(held_out[2:])
        prompts = {tuple(x["prompt"]) for x in run.evaluated}
        assert not prompts & {tuple(batch[0]["prompt"]) for batch in run.batches}
        assert size == 12 - 2 * len(prompts)  # no other row is lost
        orders += [key[:size], key[size:]]
    for i, order in enumerate(orders):
        assert order not in orders[:i]


# ---- nothing moves but by the gradient -----------------------------------------------------------

@SCRIPTS
def test_at_rate_0_nothing_moves(script, tmp_path):
    """And the evaluation after the run is that before it."""
    def standing(patch, run):
        patch.setattr(script, "learning_rate", lambda *args: 0.0)

    run = Run(script, arguments(script, tmp_path), standing)
    assert same(run.weights[0], run.weights[-1])
    assert run.summary["before"] == run.summary["after"]


def state_of(model):
    flags = [module.training for module in model.modules()]
    flags += [p.requires_grad for p in model.parameters()]
    return flags, list(model.state_dict().values()), model.active_adapters


@SCRIPTS
def test_evaluations_change_nothing(runs, script, tmp_path):
    """Neither weights nor modes nor a number of the run; the last one is what `after` says."""
    def watched(patch, run):
        def wrap(function):
            def wrapped(model, *rest):
                flags, weights, adapters = state_of(model)
                weights = [w.clone() for w in weights]
                result = function(model, *rest)
                assert state_of(model)[0] == flags and same(state_of(model)[1], weights)
                assert state_of(model)[2] == adapters
                return result
            return wrapped

        patch.setattr(script, "evaluate", wrap(script.evaluate))
        if script is sft:
            patch.setattr(script, "sample_answers", wrap(script.sample_answers))

    plain, _ = runs(script)
    run = Run(script, arguments(script, tmp_path, eval_every=1), watched)
    held = [{k: m.pop(k) for k in list(m) if k.startswith("eval_")} for m in run.metrics]
    assert run.numbers() == plain.numbers() and same(run.saved, plain.saved)
    after = {f"eval_{name}": x for name, x in run.summary["after"].items() if name != "stopped"}
    assert held[-1] == after and held[0] != after
    assert run.summary["after"] == plain.summary["after"] != plain.summary["before"]


# ---- what is saved -------------------------------------------------------------------------------

@SCRIPTS
def test_peft_alone_loads_one_adapter_that_gives_the_figures_of_the_summary(runs, script):
    """`before` is that of the start, `after` that of what is saved: one adapter, in fp32."""
    run, by_hand = runs(script)
    files = sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*.safetensors"))
    assert files == ["adapter_model.safetensors"] and not list(run.folder.glob("*.pt"))
    for name, weight in run.saved.items():
        assert weight.dtype == torch.float32
        assert "lora_" in name or script is not sft and name.endswith("score.weight")
    args = run_args(script)
    args.centering = 0.05
    held_out = list({json.dumps(x): x for x in run.evaluated}.values())
    assert len(held_out) == 4
    if script is sft:
        base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/base", dtype=torch.float32)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            ROOT / "tiny/chat", num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.folder).double()
    torch.manual_seed(0)
    start = common.load_model(args.model, task=TASK[script]).double()
    for figures, it in (run.summary["before"], start), (run.summary["after"], model):
        with torch.no_grad():
            _, expected = BY_HAND[script](it, held_out, args)
        if script is sft:
            expected["perplexity"] = math.exp(expected["loss"])
        shown = {name: figures[name] for name in expected}
        assert shown == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert figures.keys() - expected.keys() == ({"stopped"} if script is sft else set())


@SCRIPTS
def test_a_run_goes_on_from_the_adapter_and_tokenizer_of_another(runs, script, tmp_path):
    """Its `before` is the other's `after`, and it too leaves one adapter."""
    run, _ = runs(script)
    again = Run(script, arguments(script, tmp_path, model=run.folder, max_steps=1))
    assert again.summary["before"] == pytest.approx(run.summary["after"], rel=1e-5)
    assert again.saved.keys() == run.saved.keys()
    assert len(list(again.folder.rglob("*.safetensors"))) == 1
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    first = run.batches[0][0]
    ids = first[{sft: "tokens", reward_model: "chosen", prm: "solution"}[script]]["input_ids"]
    text = tokenizer.decode(ids)
    assert text.endswith(tokenizer.eos_token) and tokenizer.encode(text) == ids


# ---- 16 bits, without a GPU ----------------------------------------------------------------------

def scaled(patch, run):
    patch.setattr(common, "grad_scaler", lambda model: torch.amp.GradScaler("cpu"))


@SCRIPTS
def test_the_loss_scale_changes_nothing(runs, script, tmp_path):
    """A power of two is lost without a trace, if clipping and logging come after unscaling."""
    plain, _ = runs(script)
    run = Run(script, arguments(script, tmp_path), scaled)
    assert [line["loss_scale"] for line in run.metrics] == [65536.0] * 3
    assert [line["loss_scale"] for line in plain.metrics] == [1.0] * 3
    assert run.numbers(but=["loss_scale"]) == plain.numbers(but=["loss_scale"])
    assert same(run.saved, plain.saved)


@SCRIPTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_in_16_bits_agrees_with_one_in_32(runs, script, dtype, tmp_path):
    """The base is in 16 bits, what is trained and saved in 32."""
    def in_16_bits(patch, run):
        patch.setattr(common, "choose_dtype", lambda device: dtype)
        patch.setattr(common, "autocast", lambda model: torch.autocast("cpu", dtype))

    plain, _ = runs(script)
    run = Run(script, arguments(script, tmp_path), in_16_bits)
    assert {w.dtype for w in run.weights[-1]} == {w.dtype for w in run.saved.values()}
    assert {w.dtype for w in run.saved.values()} == {torch.float32}
    scale = 65536.0 if dtype == torch.float16 else 1.0
    for line, expected in zip(run.metrics, plain.metrics, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
        assert line["loss_scale"] == scale
    assert run.summary["after"]["loss"] == pytest.approx(plain.summary["after"]["loss"], rel=0.02)
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]  # it really was in 16 bits


def overflowing(script, killed=False):
    """In step 2 the gradient is infinite; in step 3 the run may be killed."""
    def change(patch, run):
        loss = getattr(script, LOSS[script])

        def planted(*args):
            result = loss(*args)
            if result.requires_grad and len(run.batches) == 2:
                result.register_hook(lambda gradient: gradient * math.inf)
            if result.requires_grad and len(run.batches) == 3 and killed:
                raise KeyboardInterrupt
            return result

        patch.setattr(script, LOSS[script], planted)
    return change


def all_of(*changes):
    def change(patch, run):
        for part in changes:
            part(patch, run)
    return change


@SCRIPTS
def test_an_overflow_skips_its_step_halves_the_scale_and_is_logged(script, tmp_path):
    """The scale is part of what going on needs: a run killed after it ends in the same numbers."""
    args = arguments(script, tmp_path, output_dir=tmp_path / "whole")
    run = Run(script, args, all_of(scaled, overflowing(script)))
    assert [line["loss_scale"] for line in run.metrics] == [65536.0, 32768.0, 32768.0]
    assert [line["grad_norm"] is None for line in run.metrics] == [False, True, False]
    assert same(run.weights[1], run.weights[2])
    assert not same(run.weights[0], run.weights[1]) and not same(run.weights[2], run.weights[3])

    args = arguments(script, tmp_path, output_dir=tmp_path / "killed", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        Run(script, args, all_of(scaled, overflowing(script, killed=True)))
    assert not (tmp_path / "killed/summary.json").exists()
    resumed = Run(script, args, scaled)
    assert len(resumed.batches) == 1  # of step 3 alone
    assert resumed.numbers() == run.numbers() and same(resumed.saved, run.saved)
    for when in "before", "after":
        assert resumed.summary[when] == run.summary[when]


@SCRIPTS
def test_without_a_scale_to_lower_an_infinite_gradient_is_an_error(script, tmp_path, refused):
    """In fp32 the run ends in a line that names the flag."""
    args = arguments(script, tmp_path)
    assert "--learning-rate" in refused(Run, script, args, overflowing(script))
