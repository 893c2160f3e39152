"""Rollouts of ppo.py and grpo.py: seeds, prompts per process, rewards, roles, early stopping."""
import json
from types import SimpleNamespace

import by_hand
import peft
import pytest
import torch
from conftest import ROOT, run_args
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

import common
import grpo
import ppo

ROWS = [{"prompt": by_hand.ask(f"What is {n} + {10 * n}?"), "answer": f"{11 * n}"}
        for n in range(10)]
REWARD = """
def score(prompts, completions, answer, **columns):
    return [len(text) + 100 * int(x) for text, x in zip(completions, answer)]
def for_large(prompts, completions, answer, **columns):
    return [int(x) if int(x) > 44 else None for x in answer]
def never(prompts, completions, **columns):
    return [None] * len(completions)
"""
GRADIENTS = {ppo: "minibatch_gradients", grpo: "group_gradients"}
SMALL = {ppo: dict(epochs=1, minibatches=2), grpo: dict(group_size=2)}
each_script = pytest.mark.parametrize("script", [ppo, grpo], ids=["ppo", "grpo"])


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARD)
    return str(path)


def run(script, folder, **flags):
    """A short run with answers that depend only on the prompts."""
    replace = {"sample": by_hand.fixed_sample} | flags.pop("replace", {})
    flags = SMALL[script] | dict(max_steps=1, lora_rank=4, max_new_tokens=20) | flags
    return by_hand.Run(script, folder, ROWS, ROWS[:2], watch=["rollout"], replace=replace,
                       double=False, **flags)


# ---- sampling ------------------------------------------------------------------------------------

def sampled(script, folder, monkeypatch, rank=0, world=1, **flags):
    """The calls of `sample` in a run without updates: (prompts, number of answers, seed)."""
    calls = []

    def sample(model, tokenizer, prompts, copies, args, seed):
        calls.append((prompts, len(prompts) * copies, seed))
        return by_hand.fixed_sample(model, tokenizer, prompts, copies)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(common, "WORLD", world)
    monkeypatch.setattr(script, "sample", sample)
    monkeypatch.setattr(script, GRADIENTS[script], lambda *args: dict.fromkeys(script.FIGURES, 0.0))
    torch.manual_seed(rank)  # nothing may depend on the random state of a process
    script.train(run_args(script, dataset=data, eval_size=2, batch_size=4, max_new_tokens=20,
                          output_dir=folder / str(rank), **SMALL[script] | flags))
    return calls


@each_script
def test_processes_share_the_prompts_and_no_seed_is_used_twice(script, tmp_path, monkeypatch):
    """Every epoch has each prompt once, in a new order, and no held-out prompt.

    Held-out prompts get the same random numbers before and after, in every process.
    """
    shares = [sampled(script, tmp_path, monkeypatch, rank, 2, max_steps=4, sample_batch_size=1)
              for rank in range(2)]
    before, after = shares[0][:2], shares[0][-2:]
    assert before == after == shares[1][:2] == shares[1][-2:], "held-out samples must be the same"
    seeds = [seed for _, _, seed in before + shares[0][2:-2] + shares[1][2:-2]]
    assert len(set(seeds)) == len(seeds) == 2 + 4 * 4, "a seed per process, step and part"
    epochs = [[str(prompts) for share in shares for prompts, _, _ in share[2:-2][start:start + 4]]
              for start in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]), "each epoch must have each prompt once"
    assert epochs[0] != epochs[1] and len(set(epochs[0])) == 8, "prompts must be shuffled"
    assert not set(epochs[0]) & {str(prompts) for prompts, _, _ in before}, "held-out prompts"


@each_script
def test_sample_batch_size_counts_answers(script, tmp_path, monkeypatch):
    calls = sampled(script, tmp_path, monkeypatch, max_steps=1, sample_batch_size=2)
    assert {count for _, count, _ in calls} == {2}, "a prompt of GRPO counts as its group"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_rows_of_all_processes_are_the_minibatch(world, monkeypatch):
    """Answer i of a rollout is row i // WORLD of process i % WORLD."""
    minibatch, found = torch.tensor([4, 0, 7, 5, 2]), []
    monkeypatch.setattr(common, "WORLD", world)
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        found += [row * world + rank for row in ppo.local_rows(minibatch).tolist()]
    assert sorted(found) == [0, 2, 4, 5, 7]


@each_script
def test_samples_have_their_prompts_answers_and_scores(script, tmp_path, reward_file):
    """They are the first four answers of the rollout, in its order."""
    ran = run(script, tmp_path, reward=f"{reward_file}:score")
    call, expected = ran.calls["rollout"][1], []
    copies = 2 if script is grpo else 1
    prompts = [example["prompt"] for example in call.args[2 if script is grpo else 1]]
    for i in range(4):
        prompt = prompts[i // copies]
        ids = by_hand.answer_to(prompt, i % copies)
        text = by_hand.tokenizer().decode(ids, skip_special_tokens=True)
        answer, = [row["answer"] for row in ROWS if by_hand.prompt_ids(row["prompt"]) == prompt]
        expected.append({"step": 1, "prompt": by_hand.tokenizer().decode(prompt),
                         "answer": by_hand.tokenizer().decode(ids),
                         "score": len(text) + 100.0 * int(answer)})
    assert ran.summary["samples"] == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_leaves_everything_as_it_was(training):
    """Modes, flags and random state stay; gradient checkpointing does not disable the KV cache."""
    model, widths = common.load_model("tiny/chat"), []
    prompts = [by_hand.prompt_ids(by_hand.ask(text)) for text in ("What is 36 - 25?", "Hi")]
    args = SimpleNamespace(max_new_tokens=6, temperature=1.0)
    plain = grpo.sample(model, by_hand.tokenizer(), prompts, 2, args, 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(training)
    causal = common.causal_lm(model)

    def state():
        modes = [(module.training, getattr(module, "gradient_checkpointing", None))
                 for module in model.modules()]
        grads = [(p.requires_grad, p.grad, p.sum().item()) for p in model.parameters()]
        configs = causal.config.to_dict(), causal.generation_config.to_dict()
        return modes, grads, model.active_adapter, configs, torch.get_rng_state().tolist()
    before = state()
    hook = causal.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert grpo.sample(model, by_hand.tokenizer(), prompts, 2, args, 0) == plain
    hook.remove()
    assert state() == before and widths == [len(prompts[0]), 1, 1, 1, 1, 1]


# ---- autocast and rewards ------------------------------------------------------------------------

@each_script
def test_every_forward_pass_is_under_autocast(script, tmp_path, monkeypatch):
    """That of sampling, policy, reference, critic and reward model."""
    seen, forward, open_run = [], Qwen2Model.forward, script.open_run

    def listen(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    def start(*args):
        open_run(*args)
        seen.clear()
    monkeypatch.setattr(Qwen2Model, "forward", listen)
    sample = script.sample
    run(script, tmp_path, reward="tiny/reward", max_new_tokens=3, replace={
        "open_run": start, "sample": sample,
        "common.autocast": lambda model: torch.autocast("cpu", torch.bfloat16)})
    assert len(seen) > 12 and all(seen), "a forward pass in fp32 would not fit, or differ"


def test_a_run_from_an_adapter_with_a_reward_model_beside_a_function(tmp_path):
    """The KL to that adapter starts at 0. The reward model uses its own adapter."""
    start = by_hand.save_adapter(tmp_path / "start")
    ran = run(grpo, tmp_path, model=start, reward=["tiny/reward", "correct_answer"],
              reward_weights=[0.5, 3], loss="dr_grpo", temperature=1.3)
    assert ran.summary["before"]["kl"] == 0 != ran.summary["after"]["kl"]
    file = load_file(ROOT / "tiny/reward/adapter_model.safetensors")
    head = file["base_model.model.score.weight"][0]
    call = ran.calls["rollout"][1]
    batch, answers = call.result
    for i, ids in enumerate(answers):
        example = call.args[2][i // 2]
        with torch.no_grad(), common.using(ran.model, "reward"):
            hidden = by_hand.hidden_states(ran.model, example["prompt"] + ids)
        score = (hidden[-1] @ head).item()
        text = by_hand.tokenizer().decode(ids, skip_special_tokens=True)
        is_right = float(text.split()[-1] == example["row"]["answer"])
        by_hand.close(batch["scores"][i, 0].item(), score, f"score {i}", 1e-4, 1e-4)
        by_hand.close(batch["rewards"][i].item(), 0.5 * score + 3 * is_right, "sum", 1e-4, 1e-4)


def test_a_reward_that_does_not_apply_is_no_part_of_the_sum(tmp_path, reward_file, refused):
    """Its logged mean is over the samples to which it applies, or null if there are none."""
    names = [f"{reward_file}:{name}" for name in ("score", "for_large", "never")]
    ran = run(grpo, tmp_path, reward=names, reward_weights=[0.5, 3, 7])
    batch, answers = ran.calls["rollout"][1].result
    examples = [x for x in ran.calls["rollout"][1].args[2] for _ in range(2)]
    large = []
    for i, (example, ids) in enumerate(zip(examples, answers, strict=True)):
        answer = int(example["row"]["answer"])
        length = len(by_hand.tokenizer().decode(ids, skip_special_tokens=True))
        large += [answer] * (answer > 44)
        expected = 0.5 * (length + 100 * answer) + 3 * answer * (answer > 44)
        by_hand.close(batch["rewards"][i].item(), expected, f"sum of rewards {i}")
    assert 0 < len(large) < 8
    logged = ran.metrics[0]
    by_hand.close(logged[f"reward_{names[1]}"], sum(large) / len(large), "mean where it applies")
    assert logged[f"reward_{names[2]}"] is None
    assert "NaN" not in (ran.folder / "metrics.jsonl").read_text()
    args = dict(dataset=tmp_path / "dataset.jsonl", reward=names[2], max_new_tokens=4)
    assert "every --reward returns None" in refused(
        grpo.train, run_args(grpo, output_dir=tmp_path / "none", **args))
    assert "each answer needs a number" in refused(
        ppo.train, run_args(ppo, output_dir=tmp_path / "none2", **args))


# ---- PPO's whitening, roles and epochs -----------------------------------------------------------

def test_whitening_reads_the_mask_alone_and_keeps_its_digits():
    """Mean 0, variance 1 over answer tokens. Near 10000, squares in fp32 would lose the spread."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[5], [3], [9], [1], [2], [7]])
    exact = (x[mask] - x[mask].mean()) / x[mask].std(correction=0)
    white = ppo.whiten((10000 + x.where(mask, 0.7)).float(), mask.long())
    by_hand.same(white[mask].double(), exact, "white: moments over the mask, in fp64?", 2e-3)
    assert (white[~mask] == 0).all(), "white advantages outside the answers must be 0"
    equal = ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3))
    assert equal.abs().max() < 1e-3, "equal advantages must become 0, not rounding divided by 0"


def lora_layers(model):
    return [x for x in model.modules() if isinstance(x, peft.tuners.lora.LoraLayer)]


def test_the_critic_starts_as_the_reward_model_with_weights_of_its_own(tmp_path):
    """They are trained with the policy. The weights of reward model and base stay."""
    ran = run(ppo, tmp_path, reward="tiny/reward")
    start, end = (dict(model.named_parameters()) for model in (ran.start[0], ran.model))
    for name, weight in start.items():
        is_trained = ".critic." in name or ".default." in name
        assert torch.equal(weight, end[name]) != is_trained, f"{name}: is it trained?"
        if ".critic." in name:
            assert torch.equal(weight, start[name.replace(".critic.", ".reward.")]), name
    scales = {(x.scaling["critic"], x.scaling["reward"]) for x in lora_layers(ran.model)}
    assert scales == {(2.0, 2.0)}, "alpha / rank"


def test_a_reward_function_leaves_the_critic_new(tmp_path, reward_file):
    """There is no reward adapter. The critic's head starts at 0 and learns."""
    ran = run(ppo, tmp_path, reward=f"{reward_file}:score")
    names = [name for name, _ in ran.model.named_parameters()]
    assert any(".critic." in name for name in names) and not any(".reward." in x for x in names)
    assert {x.scaling["critic"] for x in lora_layers(ran.model)} == {2.0}, "alpha / rank"
    head = ran.updates[-1].weights[-1]
    assert not ran.start[1][-1].any() and head.any(), "the critic's head, 0 at first"


def test_target_kl_ends_the_epochs_which_are_shuffled_differently(tmp_path):
    """After the first epoch whose own mean exceeds it; not by a minibatch or by the mean of all."""
    kl, rows = iter([0.01, 0.01, 0.0, 0.03, 0.03, 0.04, 0.05, 0.05]), []

    def gradients(roles, batch, some, *rest):
        rows.append(some.tolist())
        return dict.fromkeys(ppo.FIGURES, 0.0) | {"sampler_kl": next(kl)}
    ran = run(ppo, tmp_path, epochs=4, target_kl=0.025, replace={"minibatch_gradients": gradients})
    assert ran.metrics[0]["updates"] == len(rows) == 6, "the third epoch has a mean above 0.025"
    epochs = [rows[i] + rows[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs), "each answer once per epoch"
    assert len(set(map(str, epochs))) > 1, "epochs must be shuffled differently"


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, words", [
    (ppo, {"batch_size": 5, "minibatches": 6}, "--minibatches"),
    (grpo, {"reward_weights": [1, 2]}, "needs one of --reward-weights"),
    (grpo, {"reward": ["correct_answer"] * 2, "reward_weights": [1, 2]}, "--reward"),
    (grpo, {"loss": "dapo", "baseline": "none"}, "it needs a --baseline"),
    (grpo, {"reward": "tiny/reward", "model": "tiny/base"}, "one base")])
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
        script, flags, words, refused, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    assert words in refused(lambda: script.train(run_args(script, **flags)))


@pytest.mark.parametrize("script, reward, needed", [
    (ppo, ["correct_answer"], True), (ppo, ["tiny/reward"], False), (grpo, ["tiny/reward"], False),
    (grpo, ["tiny/reward", "correct_answer"], True)])
def test_rows_need_a_number_where_correct_answer_is_among_the_rewards(
        script, reward, needed, monkeypatch):
    encoders = []
    monkeypatch.setattr(common, "load_examples", lambda args, encode, *_: encoders.append(encode))
    flags = {"reward_weights": [1] * len(reward)} if script is grpo else {}
    with pytest.raises(TypeError):  # there are no examples
        script.train(run_args(script, reward=reward, **flags))
    assert encoders[0].keywords["needs_answer"] == needed


def test_gspo_and_cispo_get_the_clip_ranges_of_their_papers():
    """BY_LOSS also holds for the tiny model, and a flag on the command line wins."""
    for loss, low, high, beta in (("gspo", 3e-4, 4e-4, 0.04), ("cispo", 0.2, 5.0, 0.0),
                                  ("dapo", 0.2, 0.28, 0.0), ("dr_grpo", 0.2, 0.2, 0.0)):
        args = run_args(grpo, loss=loss)
        assert (args.epsilon, args.epsilon_high, args.beta) == (low, high, beta)
    assert run_args(grpo, loss="gspo", epsilon=0.1).epsilon == 0.1
