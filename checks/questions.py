"""Predict first: three questions per method. Each answer is computed by the method's own functions.

A question is a text, and an answer is a number or a word that `python exercise.py --predict` works
out by calling the script when it asks.
"""
import math

import torch

import agent
import distill
import dpo
import grpo
import kto
import online_dpo
import ppo
import prm
import reward_model
import sft


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def direction(loss, logps):
    """Which way a step of gradient descent moves a log-prob."""
    slope = torch.autograd.grad(loss.sum(), logps)[0].sum().item()
    return "up" if slope < 0 else "down" if slope > 0 else "neither"


def about_sft():
    logps, mask = t([math.log(0.5), math.log(0.5)]), torch.tensor([[0, 1, 1]])
    yield ("An answer has two tokens, each with probability ½. What is the loss?",
           sft.sft_loss(logps, mask, 2).item())
    chat = sft.with_mask([([1, 2, 3, 4], False), ([5, 6], True), ([7], False), ([8, 9], True)])
    yield ("A question of 4 tokens, an answer of 2, a question of 1, an answer of 2 "
           "(with their end tokens): how many tokens are trained?", sum(chat["loss_mask"]))
    # Softmax minus one-hot: a wrong token's logit falls in proportion to its probability.
    logits = t([2.0, 0.0])
    loss = sft.sft_loss(logits.log_softmax(-1)[:, :1], torch.tensor([[0, 1]]), 1)
    yield ("A model gives the trained token the probability 0.88. What is the gradient of the loss "
           "with respect to the logit of this token?",
           torch.autograd.grad(loss, logits)[0][0, 0].item())


def about_reward_model():
    zero = t(0.0)
    yield ("At the start the model rates both answers alike. What is the loss of a pair?",
           reward_model.reward_loss(zero, zero, zero, 0.0).item())
    near, far = (reward_model.reward_loss(t(x), zero, zero, 0.0).item() for x in (0.0, 100.0))
    yield ("All rewards grow by 100. Does the loss change without centering: up, down or neither?",
           "neither" if abs(reward_model.reward_loss(t(101.0), t(100.0), zero, 0.0).item()
                            - reward_model.reward_loss(t(1.0), zero, zero, 0.0).item()) < 1e-9
           else "up" if far > near else "down")
    yield ("A pair is in the wrong order by 10. What is its loss, roughly?",
           reward_model.reward_loss(zero, t(10.0), zero, 0.0).item())


def about_dpo():
    c, r = t(-12.0), t(-20.0)
    loss = dpo.preference_loss(c, r, c.detach(), r.detach())[0]
    yield "What is DPO's loss at step 0?", loss.item()
    yield ("Which way does a step push log π of the rejected answer: up, down or neither?",
           direction(loss, r))
    both = dpo.preference_loss(c - 5, r - 5, c.detach(), r.detach())[0].item()
    yield ("Both answers of every pair lose 5 nats against the reference. What is the loss now?",
           both)


def about_kto():
    def loss(ratio, label, z):
        return kto.kto_loss(ratio, torch.tensor([label]), z, 0.1, 1.0, 1.0)
    yield "What is KTO's loss at step 0 (λ = 1)?", loss(t(0.0), True, 0.0).item()
    ratio = t(-300.0)
    slope = torch.autograd.grad(loss(ratio, True, 0.0).sum(), ratio)[0].item()
    yield ("A desirable answer is 300 nats less likely than at the start (β = 0.1). What is the "
           "size of its gradient, to two decimals?", abs(round(slope, 2)))
    before, after = (loss(t(3.0), True, z).item() for z in (0.0, 2.0))
    yield ("z rises from 0 to 2. Which way does the loss of a desirable answer go: up, down or "
           "neither?", "up" if after > before else "down" if after < before else "neither")


def about_online_dpo():
    def loss(kind, y, wins):
        ref = torch.tensor([-10.0]).double()
        return online_dpo.online_loss(y, ref, ref, ref, torch.tensor([wins]), kind, 0.1, 0.01)
    y = t(-10.0)
    yield "Both answers get the same score. What is the loss of --loss dpo?", \
        loss("dpo", y, 0.5).item()
    yield "At the start, one of them wins. What is the loss?", loss("dpo", y, 0.9).item()
    drifted = t(-5.0)
    yield ("Nash-MD: π has made y 5 nats likelier than π_ref, and y wins half of the time. Which "
           "way does log π(y) go: up, down or neither?",
           direction(loss("nash_md", drifted, 0.5), drifted))


def about_ppo():
    rewards, values = t([0.0, 0.0, 1.0]).detach(), t([0.5, 0.5, 0.5]).detach()
    ones = torch.ones(1, 3)
    yield ("Three tokens, a score of 1 at the end, no KL; the critic says 0.5 everywhere. What is "
           "the advantage of the first token if λ = γ = 1?",
           ppo.gae(rewards, values, ones, 1.0, 1.0)[0][0, 0].item())
    yield "And if λ = 0?", ppo.gae(rewards, values, ones, 1.0, 0.0)[0][0, 0].item()
    logps = t([math.log(1.5)])
    loss = ppo.policy_loss(logps, torch.zeros(1, 1), t([1.0]).detach(), 0.2)[0]
    yield ("A token with advantage 1 has become 1.5 times as likely since the rollout (ε = 0.2). "
           "Which way does the next update push it: up, down or neither?", direction(loss, logps))


def about_grpo():
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 1]]))
    yield ("Four completions have the rewards 1, 0, 0, 1. What is the advantage of the first?",
           advantages[0, 0].item())
    yield ("All eight completions of a group are correct. What is the advantage of each?",
           grpo.group_advantages(torch.ones(1, 8))[0, 0].item())
    logps = torch.tensor([[-1.0], [-2.0], [-2.0], [-1.0]]).double()
    ones = torch.ones(4, 1)
    losses, _ = grpo.token_losses(logps, logps, advantages[0].double(), ones, "grpo", 0.2, 0.2)
    losses = losses + 0.04 * grpo.token_kl(logps, logps)
    yield ("What is the loss of the very first update?",
           (losses * grpo.token_weights(ones, "grpo", 4, torch.tensor(4), 1)).sum().item())


def about_prm():
    def loss(logit, label):
        return prm.step_losses(t([logit]), torch.tensor([[label]]), torch.ones(1, 1)).item()
    yield "The logit of a step is 0, and its label is wrong. What is its loss?", loss(0.0, 0)
    yield "The logit is −8 and the label correct. What is the loss, roughly?", loss(-8.0, 1)
    judged = torch.tensor([[True, True, False, True]])
    yield ("Steps are judged right, right, wrong, right. What index, from 0, does the first "
           "mistake have?", prm.first_wrong(judged).item())


def about_distill():
    half, most = t([0.5, 0.5]).log(), t([0.9, 0.1]).log()
    yield ("The student says (½, ½), the teacher (0.9, 0.1). What is the forward KL?",
           distill.divergences(half, most, "forward", 0.5).item())
    one, two = t([0.98, 0.01, 0.01]).log(), t([0.49, 0.49, 0.02]).log()
    forward, reverse = (distill.divergences(one, two, name, 0.5).item()
                        for name in ("forward", "reverse"))
    yield ("The student puts 0.98 on one of two tokens that the teacher finds equally likely "
           "(0.49). Which KL is larger: forward or reverse?",
           "forward" if forward > reverse else "reverse")
    logps = t(math.log(0.5))
    yield ("The sampled token had probability 0.5 for the student and 0.9 for the teacher. Which "
           "way does the sampled estimator push it: up, down or neither?",
           direction(distill.sampled_losses(logps, torch.tensor([math.log(0.9)])), logps))


def about_agent():
    mask = torch.tensor([[0] * 46 + [1] * 85 + [0] * 17 + [1] * 17])
    weights = agent.token_weights(mask, "grpo", 4, torch.tensor(102), 1)
    yield ("A call of 85 tokens, its result of 17, an answer of 17: how many tokens are trained?",
           agent.lengths(mask).item())
    yield ("In a group of 4, what is the weight of each trained token in the loss? "
           "(The number below the line of 1/…)", 1 / weights[0, 50].item())
    yield ("The policy writes a call that is not valid JSON. What is the first word "
           "of the result that it reads?",
           agent.run_call("{", {}, 1)[0].partition(":")[0])
