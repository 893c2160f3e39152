"""GRPO's loop: every number of a run against plain arithmetic, and what is handed to whom."""
import functools
import json
import math
import multiprocessing
import random
import statistics
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT, metrics_of, run_args
from grpo_by_hand import (
    BETA,
    CASES,
    HELD_OUT,
    LONGEST,
    RATE,
    ROWS,
    TEMPERATURE,
    by_hand,
    fixed_answers,
)
from safetensors.torch import load_file

import common
import grpo

REWARDS = """
import json, sys
def record(**given):
    with open(FILE, "a") as file:
        file.write(json.dumps(given) + "\\n")
    return [len(text) for text in given["completions"]]
def varied(prompts, completions, **columns): return [sum(map(ord, x)) % 8 for x in completions]
def varied_but_on_3(prompts, completions, difficulty, **columns):
    scores = varied(prompts, completions)
    return [1 if d == 3 else score for d, score in zip(difficulty, scores)]
def tenth(prompts, completions, difficulty, **columns): return [d / 10 for d in difficulty]
def raises(prompts, completions, **columns): raise KeyError("no such thing")
def too_few(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [0.0, float("nan")] + [0.0] * (len(prompts) - 2)
def words(prompts, completions, **columns): return ["good"] * len(prompts)
def none(prompts, completions, **columns): return None
def for_odd_rows(prompts, completions, difficulty, **columns):
    return [len(x) if d % 2 else None for x, d in zip(completions, difficulty)]
def for_no_row(prompts, completions, **columns): return [None] * len(prompts)
def exits(prompts, completions, **columns): sys.exit(0)
"""


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS.replace("FILE", repr(str(tmp_path / "given.jsonl"))))
    return str(path)


@pytest.fixture
def run(tmp_path, write_jsonl):
    """Trains on the three ROWS, all of them in each rollout, and returns the folder of the run."""
    def train(name="run", **overrides):
        defaults = dict(dataset=write_jsonl(ROWS, "train.jsonl"), max_new_tokens=LONGEST,
                        eval_dataset=write_jsonl(HELD_OUT, "held_out.jsonl"), batch_size=3,
                        group_size=3, max_steps=2, temperature=TEMPERATURE, learning_rate=RATE,
                        output_dir=tmp_path / name)
        grpo.train(run_args(grpo, **defaults | overrides))
        return tmp_path / name
    return train


@pytest.mark.parametrize("name, words", [
    ("raises", ["KeyError", "no such thing", "difficulty"]),
    ("too_few", ["not 3 numbers below 1e38 or None, but [1.0]"]), ("words", ["ValueError", "good"]),
    ("nan", ["not 3 numbers below 1e38 or None, but [0.0, nan, 0.0]"]),
    ("none", ["TypeError"]), ("exits", ["SystemExit"]), ("absent", ["KeyError", "absent"])])
def test_a_reward_that_fails_ends_the_run_in_one_line(name, words, run, reward_file, refused):
    line = refused(run, reward=f"{reward_file}:{name}")
    assert all(word in line for word in [*words, f"rewards.py:{name}"]), line


def test_rewards_get_prompts_completions_and_every_other_column(run, reward_file, tmp_path):
    """One entry per completion, in step with each other, with the weights in their sum."""
    names = [f"{reward_file}:record", f"{reward_file}:tenth"]
    folder = run(reward=names, reward_weights=[0.5, -2], max_steps=1)
    calls = [json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines()]
    assert [len(call["prompts"]) for call in calls] == [3, 9, 3]  # before, the rollout, after
    for call in calls:
        assert set(call) == {"prompts", "completions", "answer", "difficulty"}
        rows = {row["difficulty"]: row for row in ROWS + HELD_OUT}
        given = zip(call["difficulty"], call["prompts"], call["answer"], strict=True)
        for difficulty, prompt, answer in given:
            assert (prompt, answer) == (rows[difficulty]["prompt"], rows[difficulty]["answer"])
    logged, length = metrics_of(folder)[0], statistics.fmean(map(len, calls[1]["completions"]))
    assert logged[f"reward_{names[0]}"] == pytest.approx(length)
    assert logged[f"reward_{names[1]}"] == pytest.approx(12.1 / 3)
    assert logged["reward"] == pytest.approx(0.5 * length - 24.2 / 3)
    before = json.loads((folder / "summary.json").read_text())["before"]["reward"]
    length = statistics.fmean(map(len, calls[0]["completions"]))
    assert before == pytest.approx(0.5 * length - 0.2 * (2 + 7 + 396) / 3)


def test_a_reward_that_does_not_apply_is_no_part_of_the_sum(run, reward_file, refused):
    """Its mean is of the samples to which it applies; where none applies to any, it is null."""
    tokenizer = common.load_tokenizer("tiny/chat")
    examples = [{"prompt": common.encode_prompt(tokenizer, row["prompt"]), "row": row}
                for row in ROWS + HELD_OUT]
    names = [f"{reward_file}:{function}" for function in ("for_odd_rows", "tenth", "for_no_row")]
    rewards = {name: grpo.load_reward(name, "tiny/chat") for name in names}
    args = run_args(grpo, reward=names, reward_weights=[0.5, 3, 7], max_new_tokens=4)
    batch, answers = grpo.rollout(common.load_model("tiny/chat"), rewards, examples, 2, tokenizer,
                                  args, 0)
    difficulty = [example["row"]["difficulty"] for example in examples for _ in range(2)]
    lengths = [len(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    assert len({d % 2 for d in difficulty}) == 2
    expected = [3 * d / 10 + 0.5 * length * (d % 2)
                for d, length in zip(difficulty, lengths, strict=True)]
    assert batch["rewards"].tolist() == pytest.approx(expected)
    odd = [length for d, length in zip(difficulty, lengths, strict=True) if d % 2]
    means = [grpo.mean_where_it_applies(scores) for scores in batch["scores"].unbind(1)]
    assert means == [pytest.approx(statistics.fmean(odd)),
                     pytest.approx(statistics.fmean(difficulty) / 10), None]
    folder = run(reward=names[1:], reward_weights=[1, 1], max_steps=1)
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    logged = metrics_of(folder)[0]
    assert logged[f"reward_{names[2]}"] is None and math.isfinite(logged["loss"])
    line = refused(run, "none", reward=names[0])
    assert "every --reward returns None for the answer" in line


def test_rows_that_cannot_be_used_are_dropped_and_counted(capsys):
    """Those without a number only where correct_answer scores; `question` is GSM8K's prompt."""
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "x", "answer": None}, {"prompt": "x"},
            {"prompt": "y", "answer": "many"}, {"prompt": "", "answer": "2"}, {"prompt": 5},
            {"question": "What is 3?", "answer": "1 + 2 = 3\n#### 3"},
            {"prompt": "word " * 40, "answer": "2"}]
    encode = functools.partial(grpo.encode_row, max_new_tokens=8)
    strict = common.encode_rows(
        "rows", rows, functools.partial(encode, needs_answer=True), tokenizer, 40)
    report = "8 rows, 2 examples; 6 rows cannot be used, the first is row 2"
    assert report in capsys.readouterr().out
    chat = [{"role": "user", "content": "What is 3?"}]
    assert [x["row"]["prompt"] for x in strict] == ["1 + 1 =", chat]
    assert strict[1]["prompt"] == common.encode_prompt(tokenizer, chat)
    free = common.encode_rows(
        "rows", rows, functools.partial(encode, needs_answer=False), tokenizer, 40)
    assert len(free) == 6 and free[4]["row"]["prompt"] == "5"


# ---- a whole run against a plain forward pass in float64 -----------------------------------------

def check_run(folder, loss, rel=1e-4):
    steps, after, start, weights = by_hand(loss)
    for logged, expected in zip(metrics_of(folder), steps, strict=True):
        for name in ("varied_but_on_3", "tenth"):
            key, = [key for key in logged if key.endswith(":" + name)]
            logged[name.removesuffix("_but_on_3")] = logged.pop(key)
        assert logged.keys() - {"seconds", "rollout_seconds", "peak_memory_gib"} == expected.keys()
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value, rel=rel, abs=1e-5), (logged["step"], name)
    assert json.loads((folder / "summary.json").read_text())["after"] == pytest.approx(after, rel)
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len(weights)
    away, moved = [], []
    for name, weight in weights.items():
        ours = saved[name.replace(".default", "")]
        away.append((ours - weight).norm())
        moved.append((weight - start[name]).norm())
        assert ours.dtype == torch.float32 and away[-1] < 0.05 * moved[-1], name
    # of tiny gradients Adam takes the sign, and that may be rounding
    assert torch.stack(away).norm() < 0.005 * torch.stack(moved).norm()


def case_flags(loss, reward_file):
    baseline, low, high = CASES[loss]
    return dict(loss=loss, baseline=baseline, epsilon=low, epsilon_high=high, beta=BETA, updates=2,
                reward=[f"{reward_file}:varied_but_on_3", f"{reward_file}:tenth"],
                reward_weights=[2, 0.5])


@pytest.mark.parametrize("loss, micro_batch_size", [
    ("grpo", 1), ("grpo", 3), ("grpo", 9), ("dr_grpo", 4), ("dapo", 4), ("gspo", 4), ("cispo", 4)])
def test_a_run_equals_plain_arithmetic_in_float64(
        loss, micro_batch_size, run, reward_file, monkeypatch):
    """Every logged number, the held-out figures and the weights, whatever the micro-batch."""
    monkeypatch.setattr(grpo, "sample", fixed_answers)
    check_run(run(micro_batch_size=micro_batch_size, **case_flags(loss, reward_file)), loss)


def test_two_processes_equal_plain_arithmetic_too(run, reward_file, monkeypatch, tmp_path):
    """With an uneven share: two prompts and one. Forked, as they have all modules already."""
    monkeypatch.setattr(grpo, "sample", fixed_answers)

    def work(rank):
        common.RANK, common.WORLD = rank, 2
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        run(**case_flags("dapo", reward_file))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    check_run(tmp_path / "run", "dapo")


# ---- what the loop hands to whom -----------------------------------------------------------------

def spy(monkeypatch, name):
    """Writes down the arguments and the result of each call of a function of the script."""
    calls, original = [], getattr(grpo, name)

    def wrapper(*args, **kwargs):
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(grpo, name, wrapper)
    return calls


def test_prompts_cover_the_data_once_per_epoch_and_seeds_never_repeat(
        tmp_path, write_jsonl, monkeypatch):
    """Over two processes and groups sampled one at a time; held-out prompts are never among them.

    What is held out gets the same random numbers before and after.
    """
    monkeypatch.setattr(grpo, "sample", fixed_answers)
    calls = spy(monkeypatch, "sample")
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(10)]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "WORLD", 2)
        calls.clear()
        torch.manual_seed(rank)  # nothing follows from what went on before
        grpo.train(run_args(
            grpo, dataset=write_jsonl(rows), batch_size=4, max_steps=4, sample_batch_size=1,
            group_size=2, eval_size=2, max_new_tokens=LONGEST, output_dir=tmp_path / str(rank)))
        shares.append([(str(prompts), seed) for (_, _, prompts, _, _, seed), _ in calls])
    before, after = shares[0][:2], shares[0][-2:]
    assert before == after == shares[1][:2] and len(dict(before)) == 2
    trained = shares[0][2:-2] + shares[1][2:-2]
    seeds = [seed for _, seed in before + trained]
    assert len(set(seeds)) == len(seeds) == 2 + 4 * 4
    epochs = [[prompt for share in shares for prompt, _ in share[2:-2][start:start + 4]]
              for start in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == 8 and not set(epochs[0]) & set(dict(before))


@pytest.mark.parametrize("updates", [1, 3])
def test_the_ratio_is_1_in_the_first_update_and_not_after(updates, run, reward_file, monkeypatch):
    """It compares with the policy that sampled, whatever the number of updates."""
    calls = spy(monkeypatch, "token_losses")
    folder = run(updates=updates, reward=f"{reward_file}:varied")
    ratios = [(args[0] - args[1]).exp().detach()[args[3].bool()] for args, _ in calls]
    assert len(ratios) == 2 * updates
    for i, ratio in enumerate(ratios):
        assert ((ratio - 1).abs().max() < 1e-5) == (i % updates == 0), i
    assert metrics_of(folder)[0]["kl"] == 0 != metrics_of(folder)[1]["kl"]


def test_with_a_learning_rate_of_0_nothing_moves(run, reward_file, monkeypatch):
    """Neither weights nor figures; the same prompts and random numbers give the same answers."""
    monkeypatch.setattr(grpo, "learning_rate", lambda step, steps, peak: 0.0)
    folder = run(reward=f"{reward_file}:varied", updates=2)
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in saved.items() if "lora_B" in name)
    assert all(m["kl"] == 0 and m["grad_norm"] > 0 for m in metrics_of(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"] == summary["after"] and summary["before"]["kl"] == 0


def test_dapo_with_nothing_left_to_learn_from_moves_nothing(run, reward_file, monkeypatch):
    """Where no answer stops, loss and gradient are 0."""
    monkeypatch.setattr(grpo, "sample", lambda *args: [x[:-1] for x in fixed_answers(*args)])
    folder = run(loss="dapo", reward=f"{reward_file}:varied")
    for m in metrics_of(folder):
        assert m["loss"] == m["grad_norm"] == m["stopped"] == 0 and m["zero_spread"] < 1
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in saved.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter that says something else than the tiny model does."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = common.load_model("tiny/chat", lora_rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    common.save_model(model, common.load_tokenizer("tiny/chat"), folder)
    return folder


def test_a_reward_model_on_the_policys_base_scores_as_it_does_alone(adapter):
    """At the last token, whatever the padding; the policy stays as it was."""
    model = common.load_model(str(adapter))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    head = common.add_role(model, "tiny/reward", "reward")
    alone = common.load_model("tiny/reward", task="SEQ_CLS", trainable=False)
    tokenizer = common.load_tokenizer("tiny/chat")
    args = run_args(grpo, reward=["tiny/reward", "correct_answer"], reward_weights=[0.5, 3],
                    max_new_tokens=12, micro_batch_size=4)
    examples = [{"prompt": common.encode_prompt(tokenizer, row["prompt"]), "row": row}
                for row in ROWS + HELD_OUT]
    rewards = {"tiny/reward": head, "correct_answer": grpo.correct_answer}

    def state():
        return ([module.training for module in model.modules()], model.active_adapter,
                [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist(),
                random.getstate(), model.get_base_model().config.to_dict())

    before = state()
    batch, answers = grpo.rollout(model, rewards, examples, 2, tokenizer, args, 0)
    grpo.evaluate(model, rewards, examples, tokenizer, args)
    assert state() == before
    prompts = [example["prompt"] for example in examples for _ in range(2)]
    assert len({len(prompt) for prompt in prompts}) > 2
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            expected = alone(torch.tensor([prompt + answer])).logits.item()
        assert batch["scores"][i, 0].item() == pytest.approx(expected, abs=1e-4)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        right = text.split()[-1:] == [examples[i // 2]["row"]["answer"]]
        assert batch["rewards"][i].item() == pytest.approx(0.5 * expected + 3 * right, abs=1e-4)
    assert batch["scores"].std(0).min() > 0.05


def test_what_is_saved_is_one_adapter_in_fp32_that_reproduces_after(adapter, tmp_path, run,
                                                                    monkeypatch):
    """No base, no reference, no reward model; loaded by peft alone."""
    monkeypatch.chdir(ROOT)
    flags = dict(model=adapter, reward=["correct_answer", "tiny/reward"], reward_weights=[1, 0.1])
    folder = run(**flags)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {"args.json", "metrics.jsonl", "summary.json", "README.md",
                     "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja", "run.lock"}
    saved, start = (load_file(path / "adapter_model.safetensors") for path in (folder, adapter))
    assert saved.keys() == start.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.float32 and ".lora_" in name
        assert not torch.equal(weight, start[name])
    fresh = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fresh.load_adapter(adapter, "reference")
    rewards = {"correct_answer": grpo.correct_answer}
    rewards["tiny/reward"] = common.add_role(fresh, "tiny/reward", "reward")
    tokenizer = common.load_tokenizer(str(folder))
    args = SimpleNamespace(**json.loads((folder / "args.json").read_text()))
    encode = functools.partial(grpo.encode_row, max_new_tokens=LONGEST, needs_answer=True)
    _, held_out = common.load_examples(args, encode, tokenizer, 9)
    summary = json.loads((folder / "summary.json").read_text())
    after = grpo.evaluate(fresh, rewards, held_out, tokenizer, args)
    assert after == pytest.approx(summary["after"], rel=1e-4)
    assert after["kl"] != 0 == summary["before"]["kl"]  # the reference is the first adapter


def test_a_run_without_evaluations_trains_to_the_same_weights(run, reward_file, monkeypatch):
    first = run("first", reward=f"{reward_file}:varied")
    monkeypatch.setattr(grpo, "evaluate", lambda *args: {"reward": 0.0})
    second = run("second", reward=f"{reward_file}:varied")
    same_run(first, second)


def same_run(first, second):
    """Bit for bit but for the time."""
    for a, b in zip(metrics_of(first), metrics_of(second), strict=True):
        for name in a.keys() - {"seconds", "rollout_seconds", "peak_memory_gib"}:
            assert a[name] == b[name], (a["step"], name)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    for name, weight in old.items():
        assert torch.equal(weight, new[name]), name


# ---- 16 bits without a GPU -----------------------------------------------------------------------

def scale(monkeypatch, **kwargs):
    monkeypatch.setattr(common, "grad_scaler", lambda model: torch.amp.GradScaler("cpu", **kwargs))


def test_a_run_with_a_loss_scale_equals_one_without(run, reward_file, monkeypatch):
    """Gradients are clipped after they are unscaled."""
    monkeypatch.setattr(grpo, "sample", fixed_answers)
    scale(monkeypatch, init_scale=2.0**14)
    monkeypatch.setitem(by_hand("cispo")[0][0], "loss_scale", 2.0**14)
    monkeypatch.setitem(by_hand("cispo")[0][1], "loss_scale", 2.0**14)
    check_run(run(**case_flags("cispo", reward_file)), "cispo")


def test_an_overflow_skips_one_step_and_halves_the_scale(run, reward_file, monkeypatch):
    """It changes no weight and is logged; the next step is as if nothing had been."""
    scale(monkeypatch, init_scale=2.0**14)
    flags = dict(reward=f"{reward_file}:varied")
    losses = grpo.token_losses

    def overflow_once(*args):
        monkeypatch.setattr(grpo, "token_losses", losses)
        values, clipped = losses(*args)
        return values * 1e38, clipped

    monkeypatch.setattr(grpo, "token_losses", overflow_once)
    folder = run("one", max_steps=1, **flags)
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in saved.items() if "lora_B" in name)
    monkeypatch.setattr(grpo, "token_losses", overflow_once)
    first, second = metrics_of(run("two", **flags))
    assert first["grad_norm"] is None and first["loss_scale"] == second["loss_scale"] == 2.0**13
    assert second["kl"] == 0 and second["grad_norm"] > 0


def test_a_run_in_16_bits_is_near_one_in_32(run, reward_file, monkeypatch):
    """With the base in fp16 and autocast, as on a T4; what is trained stays in fp32."""
    monkeypatch.setattr(grpo, "sample", fixed_answers)
    flags = dict(reward=f"{reward_file}:varied", baseline="none", updates=2, max_steps=1,
                 learning_rate=1e-5)
    full, = metrics_of(run("full", **flags))
    scale(monkeypatch, init_scale=2.0**10)
    monkeypatch.setattr(common, "choose_dtype", lambda device: torch.float16)
    monkeypatch.setattr(common, "autocast", lambda model: torch.autocast("cpu", torch.float16))
    calls = spy(monkeypatch, "update")
    half, = metrics_of(run("half", **flags))
    for (optimizer, _, _), _ in calls:
        assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {torch.float32}
    for name in ("loss", "entropy", "grad_norm"):
        assert half[name] == pytest.approx(full[name], rel=0.02), name
    assert half["loss_scale"] == 2.0**10


def test_a_killed_run_goes_on_to_the_same_numbers(run, reward_file, monkeypatch):
    """Bit for bit, the loss scale included, which here doubles with every update."""
    scale(monkeypatch, growth_interval=1)
    flags = dict(reward=f"{reward_file}:varied", max_steps=3, updates=2)
    whole, log_step = run("whole", **flags), grpo.log_step

    def killed(args, state, metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt
        log_step(args, state, metrics)

    monkeypatch.setattr(grpo, "log_step", killed)
    # a dead process holds none
    monkeypatch.setattr(grpo.filelock.FileLock, "acquire", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        run("killed", **flags)
    monkeypatch.setattr(grpo, "log_step", log_step)
    rollouts = spy(monkeypatch, "rollout")
    same_run(whole, run("killed", **flags))
    assert len(rollouts) == 2 + 1  # steps 2 and 3, and what is held out, once
    assert [m["loss_scale"] for m in metrics_of(whole)] == [2.0**18, 2.0**20, 2.0**22]


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ({"group_size": 1}, "--group-size: 1 is not within 2"), ({"updates": 0}, "--updates"),
    ({"beta": -0.1}, "--beta"), ({"beta": math.nan}, "--beta"), ({"epsilon": 0}, "--epsilon"),
    ({"epsilon_high": -1}, "--epsilon-high"), ({"temperature": 0}, "--temperature"),
    ({"learning_rate": math.nan}, "--learning-rate"), ({"max_new_tokens": 0}, "--max-new-tokens"),
    ({"batch_size": 0}, "--batch-size"), ({"micro_batch_size": 0}, "--micro-batch-size"),
    ({"reward_weights": math.nan}, "--reward-weights"), ({"loss": "ppo"}, "--loss"),
    ({"reward_weights": [1, 2]}, "with a --reward-weights for each"),
    ({"loss": "dapo", "baseline": "none"}, "it needs a --baseline"),
    ({"reward": "shortness"}, "the reward model shortness"), ({"reward": "no.py:f"}, "no.py:f"),
    ({"reward": "tiny/chat"}, "not saved by reward_model.py"),
    ({"reward": "tiny/reward", "model": "tiny/base"}, "one base has to carry both"),
    ({"reward": ["correct_answer"] * 2, "reward_weights": [1, 2]}, "--reward")])
def test_bad_flags_are_refused_before_the_policy_is_loaded(flags, words, run, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.chdir(ROOT)
    assert words in refused(run, **flags)


def test_a_second_reward_model_is_refused(run, refused, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = dict(reward=["tiny/reward", "./tiny/reward"], reward_weights=[1, 2])
    assert "the reward model ./tiny/reward" in refused(run, **flags)


def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line(run, reward_file, capsys,
                                                                monkeypatch):
    monkeypatch.setattr(grpo, "sample", fixed_answers)
    monkeypatch.setattr(grpo, "learning_rate", lambda step, steps, peak: math.inf)
    with pytest.raises(SystemExit) as exit_info:
        run(reward=f"{reward_file}:varied")
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2 and line.startswith("error: the gradient is nan"), line
