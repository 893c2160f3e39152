"""RL with tools: GRPO where an answer may call tools and read their results, over several turns.

The one new idea is the mask. The result of a tool stands in the middle of an answer, but the
policy is not trained on it, because the environment wrote it. The loss mask is 1 on every token
that the policy sampled, and 0 on every other token. The rest of the method is the same as in
grpo.py (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300). Search-R1 (Jin et al. 2025,
arXiv:2503.09516) trains a policy with such a mask, by GRPO or PPO, to use a search engine, and
ReTool (Feng et al. 2025, arXiv:2504.11536), by PPO, to use a Python interpreter. RAGEN (Wang et al.
2025, arXiv:2504.20073) trains policies that act in games over several turns.

Why it works. An answer is now a conversation. The policy π writes a turn, which may contain tool
calls. The tools run, their results are appended, and π writes the next turn. A turn without a call
ends the answer, and its text gets the reward. Let m_t be 1 if π sampled token o_t, and 0 if the
environment wrote it. Then the probability of the answer is

    p(o) = Π_t π(o_t | o_<t)^{m_t} env(o_t | o_<t)^{1 − m_t}

The factors of the environment do not depend on the weights of the policy, so they drop out of the
gradient of log p, and therefore out of the policy gradient, which ppo.py derives:

    ∇ E[r(o)] = E[(r(o) − b) ∇ log p(o)] = E[(r(o) − b) Σ_t m_t ∇ log π(o_t | o_<t)]

So the distribution env need not be known, and no gradient has to flow through a tool. Without the
mask, the sum would also contain log π of tokens that π did not sample. The policy would learn to
assign high probability to the replies of its tools in good answers, and low probability to those in
bad answers, although it never has to write any of them. The baseline b would also add a bias,
because E[∇ log π(o_t)] is guaranteed to be 0 only for tokens that are drawn from π.

The objective is GRPO's, with the mask in the sum over tokens and in the length |o_i|:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)       mean and std of its group; std over G − 1
    J = E 1/G Σ_i 1/|o_i| Σ_t m_t { min[ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i] − β k3_t }
    |o_i| = Σ_t m_t,   ρ_t = π(o_t) / π_old(o_t),   k3_t = q − log q − 1 with q = π_ref / π

All turns of an answer share one advantage, so a useful call in an answer that turns out wrong also
becomes less likely. On average over many answers, it becomes more likely, because answers that
contain it are correct more often. The losses (--loss), the advantages (--baseline) and the KL
penalty are the functions of grpo.py. This script leaves out reward models, sums of several rewards,
and the resampling of --loss dapo: here, dapo drops a group of equal rewards without replacing it.

    prompt ──► turn ── calls ──► tools ── results ──► turn ── … ──► last turn ──► reward
    mask 0     mask 1                     mask 0      mask 1        mask 1

The second idea is practical: ids are appended, and never re-tokenized. The ids that the policy
sampled stay as they are, and the ids of the text that the chat template writes next are appended
after the end-of-turn token. If the whole conversation were rendered again, the template might write
a call with different whitespace, and the tokenizer might split it into different tokens, which
π_old never sampled.

Worked example: an answer of the tiny model, in a group with the rewards 1, 0, 0 and 1.

    mask  tokens
     0      38    <|im_start|>system … What is 123 * 456?<|im_end|> <|im_start|>assistant
     1      20    <tool_call> {"name": "calculator", … "123 * 456"}} </tool_call><|im_end|>
     0      17    <|im_start|>tool 56088<|im_end|> <|im_start|>assistant
     1       6    56088<|im_end|>

Its advantage is 0.866, and |o| = 20 + 6 = 26. At ratio 1 and without the KL, the gradient of the
loss with respect to log π is −0.866 / (4 · 26) = −0.00833 for each of the 26 sampled tokens, and 0
for the 17 tokens between the turns. Without the mask, these 17 tokens would make up 40% of the
trained tokens.

    python agent.py                                           # the tiny model and a calculator
    python agent.py --model Qwen/Qwen2.5-1.5B-Instruct        # GSM8K, in 4 bits on a GPU
    python agent.py --tools examples/tools.py:calculator examples/tools.py:look_up

A tool is a plain Python function with type hints and a docstring. The chat template writes them
into the prompt, and so the policy knows how to call the tool. A call that is not valid JSON, an
unknown tool, wrong arguments, an exception and a time-out all become a result that begins with
"error:", which the policy can read and react to. Tools run one after another in this process, with
all its privileges, so never give a policy a tool that runs code or commands outside a sandbox.
Python cannot stop a tool that exceeds --tool-seconds, so the tool keeps running in its thread until
it returns or the program ends.

What to watch: the reward rises, and failed_calls falls. If calls falls to 0, the policy has given
up on the tools: either their results do not help, or it calls them too rarely for a group to show
that they do. An answer that uses up --max-turns, or runs out of room below --max-length, ends with
a call instead of an answer to the question, and stopped falls. environment_tokens counts the tokens
that the policy reads but is not trained on. If the reward does not rise, read the conversation that
is printed at the first step and with every checkpoint. Trained tokens are green and tokens of the
environment are gray, and the error messages in gray say what fails.

Try `--max-turns 1 --max-steps 3` on the tiny model: no call is run, because no turn follows that
could read the result. Only an answer without a call could still earn a reward, but all of these
answers are wrong, so the reward is 0, zero_spread is 1, and nothing is learned.

Shapes: P prompts × G answers = B rows (b in a micro-batch) of T columns, of which L ≤ T hold a
token in some row; N sampled tokens in all, C of them at a time; D the width of the model, V the
size of its vocabulary, alive the sampled turns that have not ended.
"""
import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import re
import threading
import time
from decimal import Decimal
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common


def make_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/agent", help="Hub name, folder or LoRA adapter to start from")
    add("--tools", nargs="+", default=["examples/tools.py:calculator"],
        help="one or more tools, FILE.py:function")
    add("--tool-seconds", type=common.positive, default=5.0, help="time limit of a call in seconds")
    add("--max-turns", type=common.count, default=4,
        help="maximum number of turns of an answer; calls in the last turn are not run")
    add("--reward", default="correct_answer", help="correct_answer or FILE.py:function")
    add("--dataset", default="openai/gsm8k:main", help="prompts: Hub name[:config] or local file")
    add("--split", default="train", help="split of a Hub dataset")
    add("--columns", **common.COLUMNS)
    add("--chat-template", help=common.TEMPLATE)
    add("--template-arguments", **common.VARIABLES)
    add("--eval-dataset", help="held-out prompts; if not given, some of --dataset are held out")
    add("--eval-size", type=common.count, default=64, help="number of held-out prompts")
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"], default="grpo",
        help="variant of the loss, which also sets the defaults of --beta and the clip range")
    add("--baseline", choices=["group", "rloo", "none"], default="group",
        help="baseline: mean reward of the group, mean of the others in it (rloo), or nothing")
    add("--beta", type=common.weight, default=0.04, help="strength of the KL penalty in the loss")
    add("--epsilon", type=common.positive, default=0.2, help="lower clip, at ratio 1 − ε")
    add("--epsilon-high", type=common.positive, default=0.2,
        help="upper clip, at ratio 1 + ε; in cispo, at this number itself")
    add("--updates", type=common.count, default=1,
        help="optimizer steps per rollout; with 1, no clip binds, and gspo equals grpo")
    add("--group-size", type=common.number(int, 2), default=8, help="answers per prompt, G")
    add("--batch-size", type=common.number(int, common.WORLD), default=8,
        help="prompts per rollout, P")
    add("--micro-batch-size", type=common.count, default=2, help="answers per forward pass")
    add("--sample-batch-size", type=common.count, default=128, help="turns sampled at a time")
    add("--temperature", type=common.positive, default=1.0, help="sampling temperature")
    add("--max-length", type=common.count, default=2048,
        help="longest conversation, in tokens, including the results of tools")
    add("--max-new-tokens", type=common.count, default=512, help="longest turn, in tokens")
    add("--learning-rate", type=common.positive, default=2e-5, help=common.PEAK)
    add("--max-steps", type=common.count, default=250, help="number of rollouts")
    add("--lora-rank", **common.LORA_RANK, type=common.count)
    add("--load-in-4bit", **common.FOUR_BIT)
    add("--gradient-checkpointing", **common.CHECKPOINTING)
    add("--save-every", type=common.count, default=20, help="rollouts between checkpoints")
    add("--seed", type=common.natural, default=0, help="seed of data order, LoRA and samples")
    add("--output-dir", default="runs/agent", help=common.RESUMED)
    return parser


# What the papers of the variants set differently (for cispo, 2510.13786).
BY_LOSS = {"dr_grpo": dict(beta=0.0), "dapo": dict(beta=0.0, epsilon_high=0.28),
           "gspo": dict(epsilon=3e-4, epsilon_high=4e-4), "cispo": dict(beta=0.0, epsilon_high=5.0)}
# What the tiny model needs differently.
TINY = dict(dataset="tiny/data/tools_train.jsonl", eval_dataset="tiny/data/tools_heldout.jsonl",
            micro_batch_size=16, max_length=512, max_new_tokens=40, learning_rate=1e-3,
            max_steps=60)
FIGURES = ("loss", "entropy", "clip_fraction", "kl", "ratio_error")
COUNTS = ("calls", "failed_calls", "turns", "environment_tokens")  # of each conversation


# ---- data: prompts that show the tools -----------------------------------------------------------

def encode_question(row, tokenizer, max_length, schemas, max_new_tokens, needs_answer):
    """The row and the token ids of its prompt, into which the chat template writes the tools."""
    prompt = common.prompt_of(row, tokenizer)
    common.need(not row.get("tools"), "it has tools of its own, but only those of --tools can run")
    common.need(not prompt or isinstance(prompt, list),
                "its prompt is a string, and tools need messages: see --columns question=prompt")
    ids = common.encode_prompt(tokenizer, prompt, schemas)
    last = common.standard_message(prompt[-1])
    # Only what the policy samples is searched for calls.
    common.need(last["role"] != "assistant" or not find_calls(last["content"]),
                "it ends in the beginning of a tool call, which the policy must write itself")
    common.need(len(ids) + max_new_tokens <= max_length,
                f"prompt and first turn exceed {max_length} tokens")
    common.need(not needs_answer or plain_number(row.get("answer")) is not None,
                "its answer is not a plain number; for others, use --reward "
                "examples/rewards.py:math_answer")
    return {"prompt": ids, "row": row | {"prompt": prompt}}


# ---- tools ---------------------------------------------------------------------------------------

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
LONGEST_RESULT = 2000  # characters of a result that the policy reads; the rest is cut off


def load_tools(names):
    """The tools, {name: function}, and their schemas, which the chat template shows."""
    tools = {}
    schemas = []
    for name in names:
        function = common.load_function(name)
        with common.phase(f"--tools {name}"):
            schemas.append(schema_of(function))
            common.need(function.__name__ not in tools, "another tool has the same name")
        tools[function.__name__] = function
    return tools, schemas


def schema_of(function):
    """The schema of a tool. A function is refused if no call can run it, or if it has no result."""
    common.need(not inspect.isclass(function) and not inspect.isgeneratorfunction(function),
                "it must be a function that returns a value, not a class and not a generator")
    for parameter in inspect.signature(function).parameters.values():
        common.need(parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY),
                    f"a call names its arguments, so {parameter} cannot be *, ** or before /")
    try:
        return common.transformers.utils.get_json_schema(function)
    except NameError as error:  # in an annotation; `phase` would take it for a bug in this script
        raise ValueError(f"the type of an argument cannot be read: {error}") from None


def find_calls(text):
    """The tool calls in the text of a turn, as strings. Text inside a thought is not a call."""
    return CALL.findall(text.rpartition("</think>")[2])


def run_call(text, tools, seconds):
    """Runs a tool call. Returns the result that the policy reads, and whether the call failed."""
    outcome = []
    # A daemon thread does not keep the program alive if the tool never returns.
    thread = threading.Thread(target=run_tool, args=(text, tools, outcome), daemon=True)
    # The output that a tool prints is discarded, because it would disturb the progress bar. And a
    # tool that changes the current folder would move the checkpoints.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir("."):
        thread.start()
        thread.join(seconds)
    return outcome[0] if outcome else (f"error: no result after {seconds:g} seconds", True)


def run_tool(text, tools, outcome):
    """Runs a tool call. Appends to `outcome` its result as a string, and whether it failed."""
    try:
        call = json.loads(text)
        common.need(call["name"] in tools, f"the tools are {', '.join(tools)}")
        function = tools[call["name"]]
        result = function(**call["arguments"])
        outcome.append((str(result), False))
    except BaseException as error:  # even exit() in a tool must not end the run
        outcome.append((f"error: {type(error).__name__}: {error}", True))


def environment_ids(tokenizer, results):
    """The ids that follow a turn with tool calls: their results, and the header of the next turn.

    They are the ids of the text that the chat template writes after the end-of-turn token. The call
    that is rendered here is a dummy, because the sampled turn is never rendered or tokenized again.
    """
    call = {"name": "f", "arguments": {"x": common.MARK}}
    chat = [{"role": "user", "content": "Q"},
            {"role": "assistant", "content": "", "tool_calls": [call] * len(results)}]
    for result in results:
        # JSON can spell half a surrogate pair, which no tokenizer can read.
        text = result.encode("utf-8", "replace").decode()
        chat.append({"role": "tool", "name": "f", "content": text[:LONGEST_RESULT]})
    text = common.render(tokenizer, chat, add_generation_prompt=True)
    from_call = text.partition(common.MARK)[2]
    end_of_turn = tokenizer.convert_ids_to_tokens(common.end_of_turn_id(tokenizer))
    return common.to_ids(tokenizer, from_call.partition(end_of_turn)[2])


def check_template(tokenizer, schemas):
    """Refuses a chat template that writes tool calls in a form that `find_calls` cannot read."""
    call = {"name": schemas[0]["function"]["name"], "arguments": {"x": "y"}}
    chat = [{"role": "user", "content": "Q" + common.MARK},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": call["name"], "content": "R"}]
    with common.phase("the chat template cannot be used with tools; --chat-template names another, "
                      "such as examples/tools.jinja for a ChatML model"):
        common.need(common.end_of_turn_id(tokenizer) is not None, "no special token ends a turn")
        common.check_printed(tokenizer, chat, schemas)
        text = common.render(tokenizer, chat, schemas)
        calls = find_calls(text.rpartition(common.MARK)[2])
        common.need(len(calls) == 1 and json.loads(calls[0]) == call, "it must write a call as "
                    '<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Qwen2.5 does')


# ---- the method ----------------------------------------------------------------------------------

def token_logps(model, batch, temperature=1.0):
    """[B, T-1]: column t is log p(token t+1 | tokens ≤ t) where the loss mask is 1, else 0.

    Equivalent to these two lines, which would hold the logits of all positions in memory at once:

        logps = (model(input_ids).logits[:, :-1] / temperature).log_softmax(-1)     # [B, T-1, V]
        return logps.gather(2, input_ids[:, 1:, None])[:, :, 0] * loss_mask[:, 1:]  # [B, T-1]

    Here logits are computed only where the mask is 1, for C positions at a time, and `checkpoint`
    computes them once more in the backward pass instead of storing them.
    """
    causal = common.causal_lm(model)
    # Columns that are padding in every row are not read. L ≤ T columns remain.
    used = batch["attention_mask"].any(0)  # [T]
    inputs = {name: batch[name][:, used] for name in ("input_ids", "attention_mask")}  # [B, L]
    hidden = causal.base_model(**inputs, use_cache=False)[0]  # [B, L, D]
    # The hidden state at position t predicts token t+1, so targets start at the second token.
    is_target = batch["loss_mask"][:, 1:].bool()  # [B, T-1]
    targets = batch["input_ids"][:, 1:][is_target]  # [N]
    hidden = hidden[:, :-1][is_target[:, used[1:]]]  # [N, D]
    # The logits of one chunk take 64 MiB. All of them, [N, V], could fill a T4.
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    chunk = max(1, 2**24 // vocabulary)
    logps = []
    for piece, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logps.append(checkpoint(
            chunk_logps, piece, target, causal, temperature, use_reentrant=False))  # [C]
    zeros = torch.zeros(is_target.shape, device=hidden.device)  # [B, T-1]
    return zeros.masked_scatter(is_target, torch.cat(logps))


def chunk_logps(hidden, targets, causal, temperature):
    """The log-probs [C] of C target tokens, from the hidden states [C, D] that predict them."""
    # The softmax is computed in fp32, because 16-bit numbers are too coarse.
    logits = common.read_out(causal, hidden).float().div_(temperature)  # [C, V]
    return -F.cross_entropy(logits, targets, reduction="none")  # [C]


def group_advantages(rewards, baseline="group", scale=True):
    """Advantages [P, G] of G completions for each of P prompts, from their rewards [P, G]."""
    if baseline == "none":  # REINFORCE (Williams 1992)
        return rewards
    # A group of equal rewards must get exactly 0. Otherwise, the rounding error in its mean would
    # be divided by about 1e-4.
    above = (rewards - rewards.mean(1, keepdim=True)) * has_spread(rewards)[:, None]  # [P, G]
    if baseline == "rloo":
        # r_i minus the mean of the G − 1 others is (r_i − mean(r)) G / (G − 1).
        return above * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale:
        return above / (rewards.std(1, keepdim=True) + 1e-4)  # std over G − 1
    return above


def has_spread(rewards):
    """[P]: whether the rewards [P, G] differ within each group. If not, it teaches nothing."""
    return rewards.amax(1) > rewards.amin(1)


def token_losses(logps, old_logps, advantages, mask, loss, epsilon, epsilon_high):
    """The loss of each token, and whether the clip binds there: [B, T-1] each."""
    advantages = advantages[:, None]  # [B, 1]
    log_ratio = (logps - old_logps) * mask  # [B, T-1]
    if loss == "gspo":
        # All tokens of a sequence share one ratio, the geometric mean of theirs (GSPO, eq. 7).
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths(mask) * mask
    # With one update per rollout, π is π_old and every ratio ρ is 1. But its gradient is not 0:
    # ∇ρ = ρ ∇ log π = ∇ log π, so each token is pushed by its advantage, as in REINFORCE.
    ratio = log_ratio.exp()
    if loss == "cispo":
        # The bound, 1 + ε_high in the paper, limits a weight without a gradient (CISPO, eqs. 4, 5).
        weight = ratio.clamp(max=epsilon_high).detach()
        return -weight * advantages * logps, ratio > epsilon_high
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    # The minimum removes the gain from moving past the clip, but never the gradient that leads back
    # (PPO, eq. 7).
    return -torch.min(unclipped, clipped), clipped < unclipped


def token_kl(logps, ref_logps):
    """k3 of each token, [B, T-1] (eq. 4), which is never negative.

    Over samples of π, the mean of k3 is KL(π ‖ π_ref), and the mean of its gradient is the gradient
    of KL(π_ref ‖ π). The mean gradient of k1 would be 0.
    """
    log_q = ref_logps - logps
    return log_q.exp() - log_q - 1


def token_weights(mask, loss, sequences, tokens, longest):
    """The weight of each token in the loss, [B, T-1].

    `sequences` and `tokens` are totals over the whole batch. `longest` is the constant by which
    Dr. GRPO divides.
    """
    if loss in ("grpo", "gspo"):
        # This is the mean over sequences of the mean over their tokens.
        return mask / (lengths(mask) * sequences)
    if loss == "dr_grpo":
        # With |o_i| in place of this constant, the longer a wrong answer is, the less each of its
        # tokens costs.
        return mask / (longest * sequences)
    # dapo and cispo take the mean over all tokens of the batch (in the papers, of a group).
    return mask / tokens.clamp(min=1)


def lengths(mask):
    """The number of tokens of each sequence, [B, 1], but at least 1, because it is a divisor."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def moments(x, mask):
    """Mean and variance of x where the mask is 1, over all processes, in fp64."""
    x = x.double()
    sums = torch.stack([mask.sum(), (x * mask).sum(), (x**2 * mask).sum()])
    sum_over_processes([sums])
    count, total, squares = sums.tolist()
    return total / count, squares / count - (total / count) ** 2


def mean(x):
    """The mean of x over all processes, in fp64."""
    return moments(x, torch.ones_like(x))[0]


# ---- conversations -------------------------------------------------------------------------------

def converse(model, examples, copies, tokenizer, tools, args, seed):
    """Samples `copies` answers to each prompt. Returns one conversation per answer.

    Its `ids` are all its tokens, and its `mask` is 1 on the tokens that the policy sampled.
    """
    prompts = [list(example["prompt"]) for example in examples for _ in range(copies)]
    talks = [{"ids": ids, "mask": [0] * len(ids), "stopped": False} | dict.fromkeys(COUNTS, 0)
             for ids in prompts]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    seeds = itertools.count(seed)
    alive = talks
    while alive:
        turns = []
        for i in range(0, len(alive), args.sample_batch_size):
            # Each turn reads its conversation from the start: no KV cache is kept between turns.
            prompts = [talk["ids"] for talk in alive[i:i + args.sample_batch_size]]
            with common.autocast(model):
                turns += sample(model, tokenizer, prompts, 1, args, next(seeds))
        going = []
        for talk, ids in zip(alive, turns, strict=True):
            if add_turn(talk, ids, stop_ids, tokenizer, tools, args):
                going.append(talk)
        alive = going
    return talks


def add_turn(talk, ids, stop_ids, tokenizer, tools, args):
    """Appends a sampled turn and, if it calls tools, their results.

    Returns whether another turn follows.
    """
    talk["ids"] += ids
    talk["mask"] += [1] * len(ids)
    talk["turns"] += 1
    # The reward reads the text of the last turn, without its calls: a call is not an answer.
    talk["text"] = CALL.sub("", tokenizer.decode(ids, skip_special_tokens=True))
    # A truncated turn ends the answer. Its calls are not run, because they may be cut off, too.
    if ids[-1] not in stop_ids:
        return False
    calls = find_calls(tokenizer.decode(ids[:-1]))
    talk["stopped"] = not calls
    if not calls or talk["turns"] == args.max_turns:
        return False
    results = []
    for call in calls:
        result, has_failed = run_call(call, tools, args.tool_seconds)
        results.append(result)
        talk["failed_calls"] += has_failed
    talk["calls"] += len(calls)
    written = environment_ids(tokenizer, results)
    longest = min(args.max_length, tokenizer.model_max_length)
    if len(talk["ids"]) + len(written) + args.max_new_tokens > longest:
        return False
    talk["ids"] += written
    talk["mask"] += [0] * len(written)
    talk["environment_tokens"] += len(written)
    return True


@torch.no_grad()
def sample(model, tokenizer, prompts, copies, args, seed):
    """Samples `copies` answers to each of P prompts; returns lists of ids, grouped by prompt.

    Tokens are drawn from exactly softmax(logits / temperature): no top-k, no top-p, no penalties.
    An answer ends with its stop token, unless it was truncated at --max-new-tokens.
    """
    was_training = model.training
    model.eval()  # in train mode, gradient checkpointing would silently drop the KV cache
    causal = common.causal_lm(model)
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    stops = torch.tensor(stop_ids, device=causal.device)
    # Left padding: all prompts end in the last column, where the first token is predicted.
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"].to(causal.device)  # [P, T]
    logits, cache = common.read(causal, batch["input_ids"].to(causal.device), mask)  # [P, V]
    # Each prompt is read once. Its KV cache is then repeated, so that B = P × copies rows follow.
    rows = torch.arange(len(mask), device=causal.device).repeat_interleave(copies)  # [B]
    cache.reorder_cache(rows)
    logits, mask = logits[rows], mask[rows]  # [B, V], [B, T]
    answers = [[] for _ in mask]
    alive = torch.arange(len(mask), device=causal.device)  # the answers that have not ended
    for length in range(1, args.max_new_tokens + 1):
        probs = (logits.float() / args.temperature).softmax(-1)  # [alive, V]
        token = torch.multinomial(probs, 1, generator=generator)  # [alive, 1]
        for i, new in zip(alive.tolist(), token[:, 0].tolist(), strict=True):
            answers[i].append(new)
        going = ~torch.isin(token[:, 0], stops)  # [alive]
        if length == args.max_new_tokens or not going.any():
            break
        # Answers that have ended leave the batch, and their rows leave the KV cache.
        if not going.all():
            alive, token, mask = alive[going], token[going], mask[going]
            cache.reorder_cache(going.nonzero()[:, 0])
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = common.read(causal, token, mask, cache)  # [alive, V]
    model.train(was_training)
    return answers


def join_conversations(talks, tokenizer, model):
    """Conversations as tensors [B, T], padded on the right. The mask is 1 on sampled tokens."""
    batch = tokenizer.pad({"input_ids": [talk["ids"] for talk in talks]}, padding_side="right",
                          return_tensors="pt")
    batch["loss_mask"] = torch.zeros_like(batch["input_ids"])  # [B, T]
    for row, talk in zip(batch["loss_mask"], talks, strict=True):
        row[:len(talk["mask"])] = torch.tensor(talk["mask"])
    for name in ("stopped", *COUNTS):
        batch[name] = torch.tensor([talk[name] for talk in talks])  # [B]
    return {name: value.to(model.device) for name, value in batch.items()}


# ---- the reward ----------------------------------------------------------------------------------

def correct_answer(prompts, completions, answer, **columns):
    """1 where the last number of the completion equals the row's column `answer`, else 0."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        number = plain_number(truth)
        scores.append(float(number is not None and last_number(completion) == number))
    return scores


# 1,000 is one number, 1,2345 is two numbers, and .5 is one half.
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"


def last_number(text):
    """The last number in a string, or None. "7-3" holds 7 and 3; "-$3" is a negative number."""
    found = re.findall(r"(?:(?<![\w)])[-−]\$?)?" + NUMBER, text)
    if not found:
        return None
    return Decimal(re.sub("[,$]", "", found[-1]).replace("−", "-"))


def plain_number(text):
    r"""The answer of a row, alone or after its last ####, as a number. None for \frac{3}{4}."""
    alone = str(text).rpartition("####")[2].strip().removesuffix(".")
    is_plain = re.fullmatch(rf"([-−+]?\$?|\$[-−]){NUMBER} ?%?", alone)
    return last_number(alone) if is_plain else None


def call_reward(name, function, examples, texts):
    """Calls a reward function with the columns of the rows.

    Returns a score per text, or None where the reward does not apply.
    """
    rows = [example["row"] for example in examples]
    columns = {key: [row.get(key) for row in rows] for key in set().union(*rows)}
    columns |= {"prompts": columns.pop("prompt"), "completions": texts}
    with common.phase(f"the reward {name} (completions are strings), on {str(rows[0]):.100}"):
        scores = [None if score is None else float(score) for score in function(**columns)]
        # NaN fails this comparison, and so does a number that would be infinite in fp32.
        if len(scores) != len(rows) or not all(abs(score or 0) < 1e38 for score in scores):
            raise ValueError(f"expected {len(rows)} numbers below 1e38 (or None), got {scores}")
    return scores


# ---- the run -------------------------------------------------------------------------------------

def rollout(model, reward, examples, copies, tokenizer, tools, args, seed):
    """Samples `copies` conversations per prompt, and scores their last turns.

    Returns a batch of tensors [B, ...] with the rewards, and the conversations.
    """
    talks = converse(model, examples, copies, tokenizer, tools, args, seed)
    batch = join_conversations(talks, tokenizer, model)
    # From here on, there is one example per conversation.
    examples = [example for example in examples for _ in range(copies)]
    texts = [talk["text"] for talk in talks]
    scores = call_reward(args.reward, reward, examples, texts)
    if None in scores:
        common.fail(f"--reward {args.reward} returns None, but it is the only reward")
    batch["rewards"] = torch.tensor(scores, device=model.device)  # [B]
    with common.reference(model):
        batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)
    return batch, talks


@torch.no_grad()
def in_parts(function, model, batch, argument, args):
    """function(model, batch, argument) without gradients, one micro-batch at a time."""
    parts = []
    with common.autocast(model):
        for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
            micro = {name: value[rows] for name, value in batch.items()}
            parts.append(function(model, micro, argument))
    return torch.cat(parts)


def describe(batch):
    """Means over the conversations of all processes. `length` counts sampled tokens only."""
    figures = {"reward": mean(batch["rewards"]), "length": mean(batch["loss_mask"].sum(1)),
               "stopped": mean(batch["stopped"])}
    return figures | {name: mean(batch[name]) for name in COUNTS}


def evaluate(model, reward, held_out, tokenizer, tools, args):
    """Means over one conversation per held-out prompt. kl is KL(π ‖ π_ref), in nats per answer.

    Prompts and random numbers are the same each time, so that before and after can be compared.
    """
    batch, _ = rollout(model, reward, held_out, 1, tokenizer, tools, args, args.seed)
    logps = in_parts(token_logps, model, batch, args.temperature, args)  # [B, T-1]
    return describe(batch) | {"kl": mean((logps - batch["ref_logps"]).sum(1))}


def conversation_gradients(model, batch, scaler, args):
    """Accumulates the gradients of the conversations that are kept; returns {name: mean} to log."""
    sequences = args.batch_size * args.group_size
    longest = args.max_new_tokens * args.max_turns
    tokens = batch["loss_mask"].sum()
    kept_tokens = (batch["loss_mask"] * batch["kept"][:, None]).sum()
    sum_over_processes([tokens, kept_tokens])
    sums = {}
    for rows in torch.arange(len(batch["input_ids"])).split(args.micro_batch_size):
        micro = {name: value[rows] for name, value in batch.items()}
        mask = micro["loss_mask"][:, 1:]  # [b, T-1]: 0 on what the environment wrote
        with common.autocast(model):
            logps = token_logps(model, micro, args.temperature)  # [b, T-1]
        # In the only update of a rollout, π is still π_old.
        old_logps = micro["logps"] if args.updates > 1 else logps.detach()
        losses, is_clipped = token_losses(logps, old_logps, micro["advantages"], mask, args.loss,
                                          args.epsilon, args.epsilon_high)
        losses = losses + args.beta * token_kl(logps, micro["ref_logps"])
        weights = token_weights(mask, args.loss, sequences, kept_tokens, longest)
        losses = losses * weights * micro["kept"][:, None]  # [b, T-1]
        scaler.scale(losses.sum()).backward()
        ratio_error = ((logps - old_logps).exp() - 1).abs()
        # The logged kl is the mean of k1, summed over an answer; the loss has k3 of each token.
        add_up(sums, {"loss": losses, "kl": logps - micro["ref_logps"], "entropy": -logps,
                      "clip_fraction": is_clipped, "ratio_error": ratio_error})
    figures = over_processes(sums, FIGURES, model.device)
    figures["kl"] /= sequences
    for name in ("entropy", "clip_fraction", "ratio_error"):
        figures[name] /= tokens.item()
    return figures


def in_colors(tokenizer, talk):
    """A conversation as text: sampled tokens in green, tokens of the environment in gray."""
    text = ""
    tokens = zip(talk["mask"], talk["ids"], strict=True)
    for is_sampled, group in itertools.groupby(tokens, lambda token: token[0]):
        part = common.shown_text(tokenizer, [i for _, i in group])
        color = "\033[32m" if is_sampled else "\033[90m"
        text += f"{color}{part}\033[0m" if text else part  # the first part is the prompt
    return text


def train(args):
    # 1. Load the reward, the tools and the prompts first, so that errors show before the model
    # loads.
    if args.loss == "dapo" and args.baseline == "none":
        common.fail("--loss dapo leaves out groups of equal rewards: it needs a --baseline")
    reward = correct_answer
    if args.reward != "correct_answer":
        reward = common.load_function(args.reward)
    tools, schemas = load_tools(args.tools)
    tokenizer = common.load_tokenizer(args.model, args.chat_template, args.template_arguments)
    check_template(tokenizer, schemas)
    encode = functools.partial(encode_question, schemas=schemas, max_new_tokens=args.max_new_tokens,
                               needs_answer=args.reward == "correct_answer")
    wanted = args.max_steps * args.batch_size
    examples, held_out = common.load_examples(args, encode, tokenizer, wanted)

    # 2. Load a frozen base with trainable LoRA matrices.
    torch.manual_seed(args.seed)
    model = common.load_model(
        args.model, args.load_in_4bit, args.lora_rank, args.gradient_checkpointing)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # `update` sets the learning rate.
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    scaler = common.grad_scaler(model)  # for fp16 (a T4), where small gradients round to 0
    common.print_settings(model)

    # 3. Start a new run, or resume an interrupted one, if the files of the tools are the same.
    open_run(args, [examples, held_out, common.fingerprint(args.model, *args.tools)])
    state = restore(args, weights, optimizer, scaler)
    if "before" not in state:
        state["before"] = evaluate(model, reward, held_out, tokenizer, tools, args)
    # Prompts and random numbers depend only on seed and step, so a resumed run sees the same ones.
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(math.ceil(wanted / len(examples)))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in passes])
    progress = tqdm(range(state["step"] + 1, args.max_steps + 1), initial=state["step"],
                    total=args.max_steps, disable=common.RANK > 0)
    for step in progress:
        # 4. Let the policy answer each prompt of this process G times, and score the answers. With
        # one process, RANK is 0 and WORLD is 1, so `mine` holds all prompts of the step.
        began = time.time()
        picked = order[(step - 1) * args.batch_size:step * args.batch_size]
        mine = [examples[i] for i in picked[common.RANK::common.WORLD]]
        seed = args.seed + 10**6 * (step * common.WORLD + common.RANK)
        batch, talks = rollout(model, reward, mine, args.group_size, tokenizer, tools, args, seed)
        metrics = {"step": step, **describe(batch), "rollout_seconds": time.time() - began}

        # 5. Compute the advantages: how much better is each answer than its group?
        grouped = batch["rewards"].view(-1, args.group_size)  # [P, G]
        advantages = group_advantages(grouped, args.baseline, scale=args.loss != "dr_grpo")
        batch["advantages"] = advantages.flatten()  # [B]
        spread = has_spread(grouped)  # [P]
        batch["kept"] = torch.ones_like(batch["stopped"])  # [B]
        if args.loss == "dapo":
            # Truncated answers and groups of equal rewards count for nothing.
            batch["kept"] = batch["stopped"] & spread.repeat_interleave(args.group_size)

        # 6. Take one or more optimizer steps on these answers. After the first, π differs from
        # π_old, which sampled them.
        if args.updates > 1:
            batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)
        lr = learning_rate(step, args.max_steps, args.learning_rate)
        figures = []
        for _ in range(args.updates):
            figures.append(conversation_gradients(model, batch, scaler, args))
            updated = update(optimizer, scaler, lr)

        # 7. Log the means over the updates, print a conversation, and save a checkpoint.
        for name in FIGURES:
            metrics[name] = sum(x[name] for x in figures) / len(figures)
        # These two come from the first update, in which π is still the policy that sampled.
        for name in ("kl", "ratio_error"):
            metrics[name] = figures[0][name]
        metrics |= {"group_std": mean(grouped.std(1)), "zero_spread": 1 - mean(spread)}
        metrics |= {**updated, "seconds": time.time() - began}
        tokens = batch["attention_mask"].sum()
        sum_over_processes([tokens])
        log_step(args, state, metrics, tokens.item(), progress, ("reward", "failed_calls"))
        if step % args.save_every == 0 or step in (1, args.max_steps):
            sample = {"step": step, "conversation": common.shown_text(tokenizer, talks[0]["ids"]),
                      "score": batch["rewards"][0].item()}
            state["samples"].append(sample)
            save(args, state, weights, optimizer, scaler)
            tqdm.write(f"\na conversation of step {step}: trained tokens are green, tokens of the "
                       "environment are gray\n"
                       f"{in_colors(tokenizer, talks[0])}\nscore {sample['score']:.2f}\n")

    # 8. Evaluate again on the same held-out prompts, and save the adapter.
    finish(args, state, model, tokenizer,
           evaluate(model, reward, held_out, tokenizer, tools, args))
    show_next(args)


# ---- the optimizer step --------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Linear warm-up to `peak` over 10% of the steps, then cosine decay; never exactly 0."""
    warm_up = step / (round(0.1 * steps) + 1)
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
    return peak * min(warm_up, decay)


def update(optimizer, scaler, lr):
    """Sums the gradients over all processes, clips them and takes a step; returns what to log."""
    weights = optimizer.param_groups[0]["params"]
    # A process without a share of the batch has no gradients, but takes part in the sum.
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    sum_over_processes([weight.grad for weight in weights])
    # Clipping limits the norm of the gradient over all weights to 1.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
    # If fp16 gradients overflow, the scaler skips the step and halves its scale, down to 1.
    if not math.isfinite(norm) and scaler.get_scale() <= 1:
        common.fail(f"the gradient is {norm}: most likely the --learning-rate is too high")
    optimizer.param_groups[0]["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return {"grad_norm": norm if math.isfinite(norm) else None, "learning_rate": lr,
            "loss_scale": scaler.get_scale()}


# ---- housekeeping: nothing below is about the method, and it is the same in every script ---------

def sum_over_processes(tensors):
    """Replaces each tensor by its sum over all processes. With one process, it changes nothing."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_up(sums, figures):
    """Adds the sum of each figure, {name: [B]}, to `sums`, in fp64."""
    for name, values in figures.items():
        sums[name] = sums.get(name, 0.0) + values.detach().double().sum()


def over_processes(sums, names, device):
    """{name: float}: the sums of all processes. A process without a share of the rows adds 0."""
    totals = {name: torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device)
              for name in names}
    sum_over_processes(list(totals.values()))
    return {name: total.item() for name, total in totals.items()}


def open_run(args, examples):
    """Opens --output-dir: a new folder, or the folder of an interrupted run of the same command.

    args.json records the flags, a hash of the examples, and a hash of the files of models and
    rewards. A run is resumed only if all of them are the same.
    """
    if common.RANK > 0:
        return
    folder = Path(args.output_dir)
    file = folder / "args.json"
    data = hashlib.sha256(json.dumps(examples, default=str).encode()).hexdigest()
    loaded = [args.model]
    for flag in ("reward", "teacher"):
        value = getattr(args, flag, [])
        loaded += [value] if isinstance(value, str) else value
    files = common.fingerprint(*loaded)
    text = json.dumps(vars(args) | {"data": data, "files": files}, indent=2)
    with common.phase(f"--output-dir {folder}, which is for one run at a time"):
        folder.mkdir(parents=True, exist_ok=True)
        # The lock is released when the process ends, in whatever way. Its file may stay.
        open_run.lock = filelock.FileLock(folder / "run.lock")
        open_run.lock.acquire(blocking=False)
        ignored = (".new", ".log", ".txt", ".out", ".lock")
        names = {path.name for path in folder.iterdir() if path.suffix not in ignored}
        is_new = not names
        # A run that failed before its first checkpoint has nothing to lose, so it starts anew.
        if names == {file.name}:
            is_new = '"output_dir"' in file.read_text()
        if is_new:
            write(file, text)
        if "summary.json" in names or not file.exists() or file.read_text() != text:
            raise ValueError("it holds a finished run, a run with other flags, data, weights or "
                             "rewards, or unrelated files: name another folder")


def write(file, text):
    """Writes atomically: a killed run leaves either the old file or the new one."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


def restore(args, weights, optimizer, scaler):
    """The state of a new run, or of an interrupted one from its checkpoint, resume.pt.

    A checkpoint also holds the trained weights, {name: parameter}, and the states of optimizer
    and scaler, which are loaded here.
    """
    state = {"step": 0, "metrics": [], "samples": []}
    file = Path(args.output_dir, "resume.pt")
    if file.exists():
        with common.phase(f"reading {file}"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            common.copy_weights(saved.pop("weights"), weights)
            optimizer.load_state_dict(saved.pop("optimizer"))
            scaler.load_state_dict(saved.pop("scaler"))
            state = {name: saved.pop(name) for name in state} | saved
    # Each process initialized its own LoRA matrices. All of them train those of the first one.
    if dist.is_initialized():
        for weight in weights.values():
            dist.broadcast(weight.data, 0)
    return state


def save(args, state, weights, optimizer, scaler):
    """Writes a checkpoint, from which the same command resumes the run."""
    if common.RANK == 0:
        parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        parts["weights"] = {name: weight.data for name, weight in weights.items()}
        torch.save(state | parts, Path(args.output_dir, "resume.new"))
        Path(args.output_dir, "resume.new").replace(Path(args.output_dir, "resume.pt"))


def log_step(args, state, metrics, tokens, progress, shown):
    """Logs a step, in which all processes read `tokens` tokens, and shows some of its metrics."""
    metrics["tokens_per_second"] = round(tokens / metrics["seconds"], 1)
    metrics["peak_memory_gib"] = common.peak_memory()
    postfix = {name: metrics[name] for name in shown}
    postfix |= {"tokens/s": metrics["tokens_per_second"], "GiB": metrics["peak_memory_gib"]}
    progress.set_postfix(postfix, refresh=False)
    state["step"] = metrics["step"]
    state["metrics"].append(metrics)
    if common.RANK == 0:
        lines = [json.dumps(step) + "\n" for step in state["metrics"]]
        write(Path(args.output_dir, "metrics.jsonl"), "".join(lines))


def finish(args, state, model, tokenizer, after):
    """Saves the adapter, the model card and the summary. Printing, which can fail, comes last."""
    if common.RANK == 0:
        common.save_model(model, tokenizer, args.output_dir)
        summary = {"method": Path(__file__).stem} | vars(args) | common.settings(model)
        summary["seconds"] = sum(metrics["seconds"] for metrics in state["metrics"])
        summary |= {name: state[name] for name in ("step", "before", "samples")} | {"after": after}
        common.write_card(args.output_dir, summary)
        write(Path(args.output_dir, "summary.json"), json.dumps(summary, indent=2))
        Path(args.output_dir, "resume.pt").unlink(missing_ok=True)
    print(f"\n{'held out':<20}{'before':>9}{'after':>9}")
    for name, value in after.items():
        print(f"{common.visible(name):<20}{state['before'][name]:9.3f}{value:9.3f}")


def show_next(args):
    """Prints where the results are, and what can be done with them next."""
    use = "chat.py"
    if Path(__file__).stem in ("reward_model", "prm"):
        use = "pairs.py --output pairs.jsonl --reward"
    print(common.visible(f"\nresults: {args.output_dir}\ncurves:  python plot.py {args.output_dir}"
                         f"\ntry it:  python {use} {args.output_dir}"))


if __name__ == "__main__":
    with common.running("--micro-batch-size and --sample-batch-size, then the lengths"):
        train(common.parse(make_flags(), TINY, BY_LOSS))
