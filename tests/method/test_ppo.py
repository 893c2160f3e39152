"""PPO: its formulas by closed forms and enumeration, its roles, what it refuses.

Whole steps of the loop are in test_ppo_run.py; sampling and what scores an answer are the same as
in grpo.py and proven there.
"""
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import run_args

import common
import ppo
import reward_model

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
    (2, 0.7, None), (2, 1.1, None), (2, 1.3, 1.2),
    (-2, 0.7, 0.8), (-2, 0.9, None), (-2, 1.3, None)])
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


def test_a_micro_batch_computes_no_column_that_is_padding_in_all_its_rows(roles, monkeypatch):
    """Its shapes stay those of the rollout, and what is read of each row stays the same."""
    whole, full = outputs(roles), roles.batch
    longest = full["attention_mask"].sum(1)
    rows = longest < longest.max()
    roles.batch = {name: value[rows] for name, value in full.items()}
    read, forward = [], type(common.causal_lm(roles.model).base_model).forward

    def listen(self, input_ids, **others):
        read.append(input_ids.shape[1])
        return forward(self, input_ids, **others)

    monkeypatch.setattr(type(common.causal_lm(roles.model).base_model), "forward", listen)
    some = outputs(roles)
    roles.batch = full
    assert set(read) == {longest[rows].max().item()} and 1 <= rows.sum() < len(rows)
    for name, value in some.items():
        torch.testing.assert_close(value, whole[name][rows], atol=2e-5, rtol=1e-4)


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


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("model, reward, words", [
    ("tiny/chat", "tiny/base", "reward_model.py"), ("tiny/base", "tiny/reward", "one base"),
    ("tiny/chat", "nowhere/at-all", "nowhere/at-all"), ("tiny/chat", "no.py:f", "no.py"),
    ("tiny/chat", None, "reward_model.py")])
def test_a_wrong_reward_is_refused_before_the_policy_is_loaded(
        model, reward, words, tmp_path, refused, monkeypatch):
    """A full model, one on another base, none at all, no function, a policy's adapter."""
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(common, "load_tokenizer", None)
    if not reward:
        config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="tiny/chat")
        config.save_pretrained(tmp_path / "policy")
    args = run_args(ppo, model=model, reward=reward or tmp_path / "policy",
                    output_dir=tmp_path / "run")
    assert words in refused(ppo.train, args) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, value", [
    ("epochs", 0), ("lam", 1.1), ("gamma", -0.1), ("epsilon", 0), ("target_kl", -1), ("beta", -1),
    ("beta", "nan"), ("missing_eos_penalty", -1), ("minibatches", 0), ("value_weight", -1),
    ("temperature", 0), ("learning_rate", "inf"), ("micro_batch_size", "x")])
def test_flags_out_of_range_are_refused(flag, value, refused):
    """In one line that names the flag."""
    assert "--" + flag.replace("_", "-") in refused(run_args, ppo, **{flag: value})


@pytest.mark.parametrize("settings, words", [
    ({"batch_size": 5, "minibatches": 6}, "--minibatches"), ({"max_length": 30}, "30 tokens")])
def test_what_does_not_fit_is_refused(settings, words, tmp_path, refused, monkeypatch):
    """A minibatch without an answer, prompts without room: before anything is loaded or written."""
    monkeypatch.setattr(common, "load_model", None)
    args = run_args(ppo, dataset="tiny/data/prompt_heldout.jsonl", output_dir=tmp_path / "run",
                    **settings)
    assert words in refused(ppo.train, args) and not (tmp_path / "run").exists()
