"""PPO: its formulas by closed forms and enumeration, its roles, and whole steps of its loop.

Sampling and what scores an answer are the same as in grpo.py and proven there.
"""
import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import peft
import ppo
import pytest
import reward_model
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, metrics_of, run_args
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

EOS = 2  # of the tiny models
GARBAGE = 0.7  # stands outside the mask, where nothing may be read


def random_batch(count, seed=0, rows=6, width=9):
    """`count` random tensors [B, T-1] and a mask of ragged answers behind ragged prompts."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 4, (rows, 1), generator=g)
    end = start + torch.randint(1, 6, (rows, 1), generator=g)
    columns = torch.arange(width)
    mask = (columns >= start) & (columns < end)
    tensors = [torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(count)]
    return [x.where(mask, GARBAGE) for x in tensors] + [mask.long()]


# ---- rewards and advantages ----------------------------------------------------------------------

def test_each_token_pays_its_kl_and_the_last_one_gets_the_score():
    """−β (log π − log π_ref) per token, plus the score on the last generated token alone."""
    logps, ref, mask = random_batch(2)
    scores = torch.arange(10.0, 16.0, dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logps, ref, mask, 0.3)
    for row in range(len(mask)):
        last = max(t for t in range(mask.shape[1]) if mask[row, t])
        for t in range(mask.shape[1]):
            kl = logps[row, t].item() - ref[row, t].item() if mask[row, t] else 0
            score = scores[row].item() if t == last else 0
            assert rewards[row, t].item() == pytest.approx(-0.3 * kl + score, abs=1e-12)


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.7), (1, 1), (0.9, 0), (0.8, 1)])
def test_advantages_are_the_double_sum_of_the_paper(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} within the answer, R = A + V; nothing outside the mask is read."""
    rewards, values, mask = random_batch(2, seed=1)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        inside = mask[row].bool()
        r = rewards[row, inside].tolist()
        v = values[row, inside].tolist() + [0.0]
        got = advantages[row, inside].tolist()
        for t in range(len(r)):
            deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(t, len(r))]
            wanted = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
            assert got[t] == pytest.approx(wanted, abs=1e-12)
            assert returns[row, inside][t].item() == pytest.approx(wanted + v[t], abs=1e-12)
            discounted = sum(gamma ** i * x for i, x in enumerate(r[t:]))
            assert lam != 1 or got[t] == pytest.approx(discounted - v[t])
            assert lam != 0 or got[t] == pytest.approx(deltas[0])
    assert (advantages[mask == 0] == 0).all()


def test_whitening_reads_the_mask_alone():
    """Mean 0, variance 1 over real tokens, order kept, 0 outside; more padding changes nothing."""
    x, mask = random_batch(1, seed=2)
    white = ppo.whiten(5 * x + 3, mask)
    inside = white[mask.bool()]
    assert abs(inside.mean()) < 1e-6 and abs(inside.var(correction=0) - 1) < 1e-6
    assert (white[mask == 0] == 0).all()
    assert torch.equal(inside.argsort(), x[mask.bool()].argsort())
    wider = F.pad((5 * x + 3).where(mask.bool(), 99.0), (2, 3))
    assert torch.allclose(ppo.whiten(wider, F.pad(mask, (2, 3)))[:, 2:-3], white, atol=1e-12)
    assert ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3)).abs().max() < 1e-3


def test_whitening_keeps_its_digits():
    """Around 10000, where squares in fp32 have a rounding error as large as the variance."""
    x = 10000 + torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    exact = (x.double() - x.double().mean()) / x.double().std(correction=0)
    assert torch.allclose(ppo.whiten(x, torch.ones_like(x)).double(), exact, atol=1e-3)


# ---- the losses ----------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, clipped_to", [
    (2, 0.7, None), (2, 1.1, None), (2, 1.3, 1.2), (-2, 0.7, 0.8), (-2, 0.9, None), (-2, 1.3, None)])
def test_the_clip_cells(advantage, ratio, clipped_to):
    """No gradient for going further than the clip, always one for the way back."""
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss, clipped = ppo.policy_loss(logps, torch.zeros(1, 1), advantages, 0.2)
    assert loss.item() == pytest.approx(-advantage * (clipped_to or ratio))
    assert clipped.item() == bool(clipped_to)
    gradient, = torch.autograd.grad(loss, logps)
    assert gradient.item() == pytest.approx(0 if clipped_to else -advantage * ratio)


@pytest.mark.parametrize("value, target, moves", [
    (0.5, 1, False), (-0.5, -1, False), (0.1, 1, True), (0.5, 0, True), (-0.5, 0, True),
    (0.5, 0.3, True), (3, 1, True)])
def test_the_value_clip(value, target, moves):
    """Old value 0, ε 0.2: beyond ±0.2 towards its target a value stays, unless it overshot it."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    loss = ppo.value_loss(values, torch.zeros(1, 1), torch.full((1, 1), target), 0.2)
    read = value if moves else math.copysign(0.2, value)
    assert loss.item() == pytest.approx(0.5 * (read - target) ** 2)
    gradient, = torch.autograd.grad(loss, values)
    assert gradient.item() == pytest.approx(value - target if moves else 0)


def test_losses_token_by_token_and_by_gradcheck():
    """Both losses of random tensors are the equations' at each token, with their gradients."""
    old, noise, third, _ = random_batch(3, seed=3)
    new = (old + 0.4 * noise).requires_grad_()
    policy, value = ppo.policy_loss(new, old, third, 0.2)[0], ppo.value_loss(new, old, third, 0.2)
    for b in range(len(new)):
        for t in range(new.shape[1]):
            x, o, y = new[b, t].item(), old[b, t].item(), third[b, t].item()
            ratio = math.exp(x - o)
            surrogate = min(ratio * y, min(max(ratio, 0.8), 1.2) * y)
            assert policy[b, t].item() == pytest.approx(-surrogate, abs=1e-12)
            squares = (x - y) ** 2, (o + min(max(x - o, -0.2), 0.2) - y) ** 2
            assert value[b, t].item() == pytest.approx(0.5 * max(squares), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, third, 0.2)[0], new)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, third, 0.2), new)


@pytest.fixture
def enumerated():
    """All answers of a policy that says one or two of the tokens {stop, 1, 2}, [7, 2] each."""
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (1, 3, 1, 3)]
    answers = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    mask = torch.tensor([[1, len(y) - 1] for y in answers])
    first = torch.tensor([y[0] for y in answers])
    last = torch.tensor([y[-1] for y in answers])

    def logps(start, then):
        both = [start.log_softmax(1)[0, first], then.log_softmax(1)[first, last]]
        return torch.stack(both, 1) * mask
    policy = [table.requires_grad_() for table in tables[:2]]
    # a critic that knows what was written so far, as the real one does, and is wrong
    values = torch.tensor([[0.3, [0.0, -0.8, 1.1][y[0]]] for y in answers]) * mask
    new, ref = logps(*policy), logps(*tables[2:])
    return SimpleNamespace(policy=policy, new=new, ref=ref, mask=mask, values=values.double(),
                           probs=new.sum(1).exp(), scores=torch.randn(7, generator=g).double())


def test_k1_in_the_reward_gives_the_gradient_of_the_kl(enumerated):
    """In expectation over all answers, exactly; k3 there gives another, k1 in the loss gives 0."""
    e = enumerated
    kl = (e.probs * (e.new - e.ref).sum(1)).sum()
    truth = torch.autograd.grad(kl, e.policy, retain_graph=True)
    rewards = ppo.token_rewards(torch.zeros(7).double(), e.new, e.ref, e.mask, 0.3)
    assert (e.probs * rewards.sum(1)).sum().item() == pytest.approx(-0.3 * kl.item())
    k3 = ((e.ref - e.new).exp() - (e.ref - e.new) - 1) * e.mask
    for total, right in (rewards.sum(1), True), (-0.3 * k3.sum(1), False):
        reinforce = (e.probs.detach() * total.detach() * e.new.sum(1)).sum()
        followed = torch.autograd.grad(reinforce, e.policy, retain_graph=True)
        for got, true in zip(followed, truth, strict=True):
            assert torch.allclose(got, -0.3 * true, atol=1e-12) == right
            assert true.abs().max() > 0.01
    for got in torch.autograd.grad((e.probs.detach() * rewards.sum(1)).sum(), e.policy):
        assert got.abs().max() < 1e-12


def test_the_whole_chain_follows_the_true_gradient(enumerated):
    """Rewards, advantages over a wrong critic and the loss at ratio 1: ∇ (E[score] − β KL)."""
    e = enumerated
    goal = (e.probs * (e.scores - 0.3 * (e.new - e.ref).sum(1))).sum()
    truth = torch.autograd.grad(goal, e.policy, retain_graph=True)
    old = e.new.detach()
    rewards = ppo.token_rewards(e.scores, old, e.ref, e.mask, 0.3)
    advantages, returns = ppo.gae(rewards, e.values, e.mask, 1.0, 1.0)
    losses = ppo.policy_loss(e.new, old, advantages, 0.2)[0] * e.mask
    followed = torch.autograd.grad((e.probs.detach() * losses.sum(1)).sum(), e.policy)
    for got, true in zip(followed, truth, strict=True):
        assert torch.allclose(-got, true, atol=1e-12) and true.abs().max() > 0.01
    assert torch.allclose(returns[:, 0], e.scores - 0.3 * (old - e.ref.detach()).sum(1))


# ---- the roles -----------------------------------------------------------------------------------

@pytest.fixture
def roles():
    """A policy off its reference, reward model and critic, and a batch of unequal answers."""
    torch.manual_seed(0)
    model = common.load_model("tiny/chat", lora_rank=4)
    reward = common.add_role(model, "tiny/reward", "reward")
    critic = common.add_role(model, "tiny/reward", "critic", trainable=True)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(weight, std=0.02)
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = common.load_rows("tiny/data/prompt_train.jsonl", "train", 4, 0)[:4]
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = [tokenizer(text)["input_ids"] for text in ("11", "36 - 25 = 11", "97", "1 = 5 = 5")]
    batch = ppo.join_answers(prompts, [ids + [EOS] for ids in answers], tokenizer, model)
    return SimpleNamespace(model=model, reward=reward, critic=critic, batch=batch,
                           tokenizer=tokenizer, examples=[{"prompt": ids} for ids in prompts])


@torch.no_grad()
def outputs(roles):
    """What each role says about the batch."""
    model, batch, out = roles.model, roles.batch, {}
    out["policy"] = ppo.token_logps(model, batch)
    with common.reference(model):
        out["reference"] = ppo.token_logps(model, batch)
    with common.using(model, "reward"):
        out["reward"] = ppo.sequence_rewards(model, batch, roles.reward)
    with common.using(model, "critic"):
        out["critic"] = ppo.token_values(model, batch, roles.critic)
        out["end"] = ppo.sequence_rewards(model, batch, roles.critic)
    return out


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_step_of_one_role_moves_no_other(role, roles):
    """Gradients reach its matrices (and head) alone; the others answer as before, bit for bit."""
    before = outputs(roles)
    assert not torch.equal(before["policy"], before["reference"])
    trained = {n: p for n, p in roles.model.named_parameters() if p.requires_grad}
    trained["critic.head"] = roles.critic.weight
    if role == "policy":
        ppo.token_logps(roles.model, roles.batch).sum().backward()
    else:
        with common.using(roles.model, "critic"):
            ppo.token_values(roles.model, roles.batch, roles.critic).sum().backward()
    moved = {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    part = ".default." if role == "policy" else "critic"
    assert moved == {n for n in trained if part in n} and len(moved) > 2
    assert not any("reward" in n or "reference" in n for n in trained)
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    after = outputs(roles)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"policy"} if role == "policy" else {"critic", "end"})


def test_values_are_read_before_their_token(roles):
    """And ignore padding, other answers and tokens to come: as the shorter text alone gives."""
    values, mask = outputs(roles)["critic"], roles.batch["loss_mask"][:, 1:]
    assert (values[mask == 0] == 0).all()
    for b, t in mask.nonzero().tolist():
        with torch.no_grad(), common.using(roles.model, "critic"):
            ids = roles.batch["input_ids"][b:b + 1, :t + 1]  # the value is of token t + 1
            hidden = common.causal_lm(roles.model).base_model(input_ids=ids)[0][0, -1]
        assert values[b, t].item() == pytest.approx((hidden @ roles.critic.weight[0]).item(),
                                                    abs=2e-5)


def test_the_critic_starts_as_the_reward_model_with_weights_of_its_own(roles):
    """It gives the reward model's scores, of which no weight is shared or trained."""
    said = outputs(roles)
    assert torch.equal(said["end"], said["reward"])
    named = dict(roles.model.named_parameters()) | {"critic": roles.critic.weight}
    critic = {p.data_ptr() for n, p in named.items() if "critic" in n and p.requires_grad}
    reward = [p for n, p in named.items() if ".reward." in n] + [roles.reward.weight]
    assert len(critic) == len(reward) == 71
    assert not any(p.requires_grad or p.data_ptr() in critic for p in reward)


def test_the_reward_model_scores_as_reward_model_py_does(roles):
    """The adapter on the policy's base says what the same run says as it loads itself."""
    alone = common.load_model("tiny/reward", trainable=False, task="SEQ_CLS")
    with torch.no_grad():
        scores = reward_model.sequence_rewards(alone, roles.batch, common.causal_lm(alone).score)
    assert torch.allclose(outputs(roles)["reward"], scores, atol=1e-5) and scores.std() > 0.1


def test_a_rollout_leaves_everything_as_it_was(roles):
    """Mode, adapter, flags, random numbers, cache switch and weights."""
    def state():
        model = roles.model
        flags = [p.requires_grad for p in model.parameters()]
        return (model.training, model.active_adapter, flags, torch.get_rng_state().tolist(),
                common.causal_lm(model).config.use_cache,
                [p.sum().item() for p in model.parameters()])
    before = state()
    args = run_args(ppo, max_new_tokens=5)
    three = roles.model, roles.reward, roles.critic
    batch, answers = ppo.rollout(three, roles.examples, roles.tokenizer, args, 0)
    assert state() == before and len(answers) == 4 and not batch["logps"].requires_grad


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
    for pairs, rate in zip(seen.rollouts[1:-1], (1e-3, 5e-4), strict=True):
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
        kl = [x["sampler_kl"] for x in figures]
        hand.kl_of_epochs.append([(kl[i] + kl[i + 1]) / 2 for i in (0, 2, 4)])
        hand.metrics.append(metrics | {"grad_norm": norm, "learning_rate": rate, "updates": 6})
    hand.after = describe_by_hand(plain, policy, reward, score, seen.rollouts[-1])
    return hand


BY_HAND = {"gamma": 0.9, "lam": 0.7, "temperature": 1.5, "minibatches": 2, "value_weight": 0.7,
           "missing_eos_penalty": 0.8, "learning_rate": 1e-3}
WAYS = {"whole": {"micro_batch_size": 5}, "threes": {"micro_batch_size": 3},
        "ones": {"micro_batch_size": 1, "sample_batch_size": 2},
        "checkpointing": {"micro_batch_size": 3, "gradient_checkpointing": "on"}}


@pytest.fixture(scope="module")
def first_run(data, tmp_path_factory):
    """A run in float64, what it saw, and the same by hand."""
    with doubles() as patch:
        seen = watch(patch)
        run(tmp_path_factory.mktemp("first") / "run", **data, **BY_HAND, **WAYS["whole"])
    with doubles():
        return seen, train_by_hand(seen)


@pytest.mark.parametrize("way", WAYS)
def test_two_steps_of_the_loop_are_those_by_hand(way, first_run, data, tmp_path):
    """Each logged number and each weight, however the batch is divided or checkpointed."""
    first, hand = first_run
    with doubles() as patch:
        seen = watch(patch)
        metrics, summary = run(tmp_path / "run", **data, **BY_HAND, **WAYS[way])
    assert (seen.rollouts, seen.rows) == (first.rollouts, first.rows)
    assert common.causal_lm(seen.model).is_gradient_checkpointing == (way == "checkpointing")
    for got, wanted in zip(metrics, hand.metrics, strict=True):
        assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert summary["before"] == pytest.approx(hand.before, rel=1e-6, abs=1e-9)
    assert summary["after"] == pytest.approx(hand.after, rel=1e-6)
    named = dict(seen.model.named_parameters())
    for role in "policy", "critic":
        got = matrices(named, {"policy": "default"}.get(role, role))
        for name, pair in getattr(hand, role).items():
            assert torch.allclose(got[name][0], pair[0], atol=1e-7)
            assert torch.allclose(got[name][1], pair[1], atol=1e-7)
    assert torch.allclose(seen.heads["critic"].weight[0], hand.head, atol=1e-7)
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
    """At the first epoch whose own mean is beyond it, not that of all so far, nor before."""
    kl = first_run[1].kl_of_epochs[0]
    assert kl[0] < kl[1] < kl[2]
    with doubles() as patch:
        watch(patch)
        settings = data | BY_HAND | {"max_steps": 1, "micro_batch_size": 5}
        for number, target in enumerate((0.99 * kl[1], 1.01 * kl[1])):
            metrics, _ = run(tmp_path / str(number), **settings | {"target_kl": target})
            assert metrics[0]["updates"] == (4, 6)[number]


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
        seen.metrics, seen.summary = run(folder, **data | {"learning_rate": 3e-3})
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
    assert abs(sum(kl)) > 0.1 and finished.summary["before"]["kl"] == 0


def test_a_run_from_an_adapter_is_its_own_reference(finished, data, tmp_path):
    """Its KL starts at 0, though the base alone would be another policy; the copy stays."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        settings = data | {"max_steps": 1, "model": finished.folder, "learning_rate": 3e-3}
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
    state = {"step": 0, "metrics": [], "before": finished.summary["before"]}
    monkeypatch.setattr(ppo, "restore", lambda args, parts: state)
    _, summary = run(tmp_path / "run", **data | {"learning_rate": 3e-3})
    assert_same_run(finished, tmp_path / "run", summary)


def test_an_interrupted_run_goes_on_to_the_same_numbers(finished, data, tmp_path, monkeypatch):
    """Stopped in its second step, the same command ends as if it had never been."""
    log_step, settings = ppo.log_step, data | {"learning_rate": 3e-3}

    def stop(args, state, metrics):
        if metrics["step"] == 2:
            raise InterruptedError
        log_step(args, state, metrics)
    monkeypatch.setattr(ppo.fcntl, "flock", lambda *rest: None)  # two runs in this process
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "log_step", stop)
        with pytest.raises(InterruptedError):
            run(tmp_path / "run", **settings)
    assert len(metrics_of(tmp_path / "run")) == 1
    seen = watch(monkeypatch, ppo.sample)
    _, summary = run(tmp_path / "run", **settings)
    assert len(seen.rollouts) == 2  # the second step, and the figures of the end
    assert_same_run(finished, tmp_path / "run", summary)


def test_learning_rate_0_moves_nothing(data, tmp_path, monkeypatch):
    """All that moves a weight is scaled by the rate."""
    seen = watch(monkeypatch)
    monkeypatch.setattr(ppo, "learning_rate", lambda step, steps, highest: 0.0)
    _, summary = run(tmp_path / "run", **data | {"max_steps": 1})
    assert summary["before"] == summary["after"] and not any(x.moved for x in seen.steps)
    assert all(x.logged["grad_norm"] > 0 for x in seen.steps) and len(seen.steps) == 6


def test_a_reward_function_leaves_the_critic_new(data, tmp_path, monkeypatch):
    """The function's mean is logged; there is no reward role, and the critic starts at 0."""
    seen = watch(monkeypatch)
    heads, add_role = [], common.add_role

    def keep(*args, **options):
        heads.append(add_role(*args, **options).weight.detach().clone())
        return seen.heads["critic"]
    monkeypatch.setattr(common, "add_role", keep)
    path = tmp_path / "rewards.py"
    path.write_text("def length(prompts, completions, answer, **columns):\n"
                    "    return [len(text) + float(x) for text, x in zip(completions, answer)]\n")
    metrics, _ = run(tmp_path / "run", **data | {"max_steps": 1, "reward": f"{path}:length"})
    tokenizer = common.load_tokenizer("tiny/chat")
    rows = common.load_rows(str(data["dataset"]), "train", 9, 0)
    right = {tuple(common.encode_prompt(tokenizer, row["prompt"])): row["answer"] for row in rows}
    scores = []
    for prompt, answer in seen.rollouts[1]:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        scores.append(len(text) + float(right[tuple(prompt)]))
    assert metrics[0]["reward"] == pytest.approx(sum(scores) / 5)
    assert len(heads) == 1 and (heads[0] == 0).all() and seen.heads["critic"].weight.any()


# ---- 16 bits -------------------------------------------------------------------------------------

def plant_overflow(monkeypatch):
    """The first backward pass of the policy gives gradients that are not finite."""
    policy_loss, calls = ppo.policy_loss, []

    def overflowing(*args):
        loss, clipped = policy_loss(*args)
        calls.append(1)
        return loss * (1e38 if len(calls) == 1 else 1) * (10 if len(calls) == 1 else 1), clipped
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
    settings = data | {"epochs": 1, "minibatches": 1, "micro_batch_size": 5}
    metrics, summary = run(tmp_path / "run", **settings)
    assert [x.moved for x in seen.steps] == [False, True]
    assert [x["loss_scale"] for x in metrics] == [32.0, 32.0]
    assert metrics[0]["grad_norm"] is None and 0 < metrics[1]["grad_norm"] < 100
    assert summary["dtype"] == "float16" and metrics[1]["kl"] == 0
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
    settings = data | {"learning_rate": 3e-3}
    metrics, summary = run(tmp_path / "run", **settings)
    for got, wanted in zip(metrics, finished.metrics, strict=True):
        assert got["loss_scale"] == 2 ** 16 and wanted["loss_scale"] == 1
        for name in *ppo.FIGURES, "grad_norm", "explained_variance", "kl":
            assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert summary["after"] == pytest.approx(finished.summary["after"], rel=1e-4)


# ---- several processes, bad input ----------------------------------------------------------------

def test_two_processes_equal_one(data, tmp_path, monkeypatch):
    """torchrun gives the numbers of one process, also where one of two has no row at all."""
    settings = {name: str(value) for name, value in data.items()} | BY_HAND | {"minibatches": 3}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", __file__,
               json.dumps(settings | {"output_dir": str(tmp_path / "two")})]
    child = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    monkeypatch.setattr(ppo, "sample", fixed_sample)
    metrics, summary = run(tmp_path / "one", **settings)
    for a, b in zip(metrics, metrics_of(tmp_path / "two"), strict=True):
        for name in a.keys() - {"seconds", "rollout_seconds"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name
    two = json.loads((tmp_path / "two/summary.json").read_text())
    assert two["after"] == pytest.approx(summary["after"], rel=2e-3)


@pytest.mark.parametrize("model, reward, words", [
    ("tiny/chat", "tiny/base", "reward_model.py"), ("tiny/base", "tiny/reward", "one base"),
    ("tiny/chat", "nowhere/at-all", "nowhere/at-all"), ("tiny/chat", "a policy", "reward_model.py"),
    ("tiny/chat", "no.py:f", "no.py")])
def test_a_wrong_reward_is_refused_before_the_policy_is_loaded(
        model, reward, words, data, finished, tmp_path, refused, monkeypatch):
    """In one line, and nothing is left behind."""
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(common, "load_tokenizer", None)
    reward = str(finished.folder) if reward == "a policy" else reward
    line = refused(run, tmp_path / "run", **data, model=model, reward=reward)
    assert words in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, words", [
    ({"batch_size": 5, "minibatches": 6}, "--minibatches"), ({"epochs": 0}, "--epochs"),
    ({"lam": 1.1}, "--lam"), ({"gamma": -0.1}, "--gamma"), ({"epsilon": 0}, "--epsilon"),
    ({"target_kl": -1}, "--target-kl"), ({"beta": -1}, "--beta"), ({"beta": "nan"}, "--beta"),
    ({"missing_eos_penalty": -1}, "--missing-eos-penalty"), ({"minibatches": 0}, "--minibatches"),
    ({"value_weight": -1}, "--value-weight"), ({"temperature": 0}, "--temperature"),
    ({"learning_rate": "inf"}, "--learning-rate"), ({"max_length": 20}, "exceed 20 tokens")])
def test_bad_flags_are_refused(settings, words, data, tmp_path, refused, monkeypatch):
    """In one line that names the flag, before anything is loaded or written."""
    monkeypatch.setattr(common, "load_model", None)
    assert words in refused(run, tmp_path / "run", **data | settings)
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":  # one of the two processes above
    ppo.sample = fixed_sample
    with common.running("nothing"):
        ppo.train(run_args(ppo, **json.loads(sys.argv[1])))
