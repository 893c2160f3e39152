"""What every script shares: loading models and rows, and turning rows into token ids.

A model is a Hub name, a folder or a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) on a frozen
base, in 4 bits on a GPU (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). A row becomes pieces,
(ids, is_answer), of which the scripts make examples. One that is of no use raises ValueError.
"""
# ruff: noqa: E402
import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path

for chatty in "bitsandbytes", "huggingface_hub":  # they advertise a kernel and report every retry
    logging.getLogger(chatty).setLevel(logging.CRITICAL)

import bitsandbytes
import datasets
import huggingface_hub
import peft
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.integrations import sdpa_attention

HERE = Path(__file__).resolve().parent
SCORE = "base_model.model.score.weight"  # a reward model's head in the file of its adapter
QUOTE = "\ufdd0"  # a code point that no text has
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model")
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
RANK = int(os.environ.get("RANK", 0))  # torchrun starts WORLD processes and gives each its RANK
WORLD = int(os.environ.get("WORLD_SIZE", 1))
ON_GPU = {"choices": ["on", "off"], "default": "on" if torch.cuda.is_available() else "off"}

transformers.logging.set_verbosity_error()
# no bars for what is read from this disk: that takes seconds. Downloads show theirs
transformers.logging.disable_progress_bar()
if RANK == 0 and not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:  # or it warns
    huggingface_hub.utils.enable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it also raises
datasets.disable_progress_bars()
# with AVX512-BF16 an eval forward repacks 4-bit weights, and the next training step fails
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)


# ---- errors and flags ----------------------------------------------------------------------------

def visible(text: str) -> str:
    """Text from data with its control characters spelled out: it cannot move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def fail(message: str):
    """Ends the program over something that the user can mend: one line on stderr, exit code 2.

    With TRACEBACK=1 in the environment, the traceback of what went wrong stands above the line.
    """
    # where all fail alike, the first speaks, and torchrun ends the rest
    time.sleep(3 if RANK > 0 else 0)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the line is not glued to it
    if os.environ.get("TRACEBACK") == "1" and sys.exc_info()[0]:
        sys.excepthook(*sys.exc_info())
    print(f"error: {visible(' '.join(message.split())):.500}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def phase(doing: str):
    """Whatever goes wrong inside becomes one line: libraries and users raise types of their own."""
    try:
        yield
    except (torch.OutOfMemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # asyncio's CancelledError is no Exception
        # datasets says only that "an error occurred"; an error may be its own cause
        for _ in range(9):
            error = error.__cause__ or error
        fail(f"{doing}: {type(error).__name__}: {str(error) or 'no reason given'}")


RESUMES = "; the same command resumes an interrupted run"
ADVICE = {"KeyboardInterrupt": "interrupted{resumes}",
          "BrokenPipe": "nobody reads the output any more{resumes}",
          "MemoryError|allocate memory|out of memory|ALLOC_FAILED": "out of memory: lower {flags}",
          # torch does not say why it could not write
          "No space left|[Dd]isk quota|inline_container": "the disk is full{resumes}"}


@contextlib.contextmanager
def running(memory_flags: str, resumes: str = RESUMES):
    """Around a whole run: its processes find each other, and what a user can mend is one line.

    `resumes` ends the lines of an interruption; it is "" for a program that cannot be resumed.
    """
    # a closed stream is None, and the next file to be opened would get its number
    sys.stdin = sys.stdin or open(os.devnull)
    if RANK > 0 or not sys.stdout:
        sys.stdout = open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    if WORLD > 1:
        dist.init_process_group("nccl" if choose_device().type == "cuda" else "gloo")
    try:
        yield
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again at its end
        for sign, advice in ADVICE.items():
            if re.search(sign, f"{type(error).__name__}: {error}"):
                fail(advice.format(flags=memory_flags, resumes=resumes))
        raise
    if WORLD > 1:
        dist.destroy_process_group()


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type that refuses what is out of range, NaN included."""
    def within(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} and {high:g}")
        return kind(text)

    within.__name__ = kind.__name__  # for argparse's message
    return within


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 1e-9)
weight = number(float, 0)
share = number(float, 0, 1)


def parse(flags: argparse.ArgumentParser, tiny: dict, by_loss: dict | None = None):
    """The flags; the tiny model and each --loss may need other defaults than the rest."""
    flags = copy.deepcopy(flags)  # its defaults change below; those of the next run must not
    flags.error = fail
    args = flags.parse_args()
    flags.set_defaults(**by_loss[args.loss] if by_loss and args.loss in by_loss else {})
    if is_tiny(args.model):
        flags.set_defaults(**tiny)
        if flags.parse_args().dataset != tiny["dataset"]:
            flags.set_defaults(eval_dataset=None)  # the tiny world's held-out rows go with its own
    if getattr(args, "lora_rank", None) == 0:  # all weights together take smaller steps
        flags.set_defaults(learning_rate=flags.get_default("learning_rate") / 10)
    args = flags.parse_args()
    with phase(f"--output-dir {args.output_dir}"):
        # the tokenizer, which is saved last, takes no other names
        if not args.output_dir.encode() or Path(args.output_dir, "summary.json").exists():
            raise ValueError("it is empty or holds a finished run: name another folder")
    return args


# ---- models --------------------------------------------------------------------------------------

def choose_device() -> torch.device:
    """The GPU of this process (torchrun sets LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # bitsandbytes and nccl use it
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU; bf16 from compute capability 8.0 on, which a T4 only emulates; else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(model):
    """The number format of the forward passes; what is trained stays in fp32."""
    kind = model.device.type
    return torch.autocast(kind, choose_dtype(model.device), enabled=kind == "cuda")


def grad_scaler(model):
    """For fp16, in which small gradients round to 0. With bf16 and fp32 it does nothing."""
    fp16 = choose_dtype(model.device) == torch.float16
    scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
    scaler.scale(torch.zeros((), device=model.device))  # its scale is made at first use
    return scaler


def find(name: str) -> str:
    """`name`, or what has that name beside this file: tiny/chat is found from any folder."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def adapter_config(name: str) -> peft.PeftConfig | None:
    """The config of a LoRA adapter, or None for a full model."""
    is_adapter = transformers.utils.peft_utils.find_adapter_config_file(find(name))
    return peft.PeftConfig.from_pretrained(find(name)) if is_adapter else None


def base_of(name: str) -> str:
    """Where the full model of `name` is: itself, or the base of an adapter."""
    adapter = adapter_config(name)
    return find(adapter.base_model_name_or_path if adapter else name)


def fingerprint(*names: str) -> str:
    """A hash of what models and FILE.py:function are made of.

    Of a file above 256 MiB it takes 4 KiB of every MiB: training changes nearly all weights of a
    matrix, and a model of 15 GB then takes 15,000 short reads.
    """
    digest = hashlib.sha256()
    for name in [*names, base_of(names[0])]:
        path = Path(find(re.sub(r"\.py:.*", ".py", name)))
        files = [path] if path.is_file() else sorted(path.glob("*"))
        for file in files:
            if file.is_file() and file.suffix in (".py", *MODEL_FILES):
                with phase(f"reading {file}"), file.open("rb") as opened:
                    size = file.stat().st_size
                    digest.update(f"{file.name} {size} ".encode())
                    block = 2**20 if size <= 2**28 else 2**12
                    for place in [*range(0, size, 2**20), max(0, size - block)]:
                        opened.seek(place)
                        digest.update(opened.read(block))
        for config in ("config.json", "adapter_config.json") if not path.exists() else ():
            # of a model of the Hub, the cache has each commit in a folder of that name
            cached = huggingface_hub.try_to_load_from_cache(name, config)
            digest.update(Path(cached).parent.name.encode() if isinstance(cached, str) else b"")
    return digest.hexdigest()


def is_tiny(name: str) -> bool:
    """True for the embedded models and what was trained from them."""
    with phase(f"loading the model {name}"):
        base = Path(base_of(name))
        if (base / "summary.json").exists():  # of a run that trained all weights
            base = Path(find(json.loads((base / "summary.json").read_text()).get("model", name)))
        return base.is_dir() and base.resolve().is_relative_to(HERE / "tiny")


def load_model(name: str, load_in_4bit: str = ON_GPU["default"], lora_rank: int = 16,
               gradient_checkpointing: str = ON_GPU["default"], trainable: bool = True,
               task: str = "CAUSAL_LM"):
    """Loads a model with a LoRA adapter "default" to train, in fp32; all else is frozen.

    If `name` is an adapter, training goes on with its matrices, and a frozen copy of them stays as
    "reference". `lora_rank` 0 trains all weights, never in 4 bits; `trainable=False` none. The task
    SEQ_CLS gives a reward model: a scalar head `score`, trained and saved with the adapter.
    """
    device = choose_device()
    full = trainable and lora_rank == 0
    dtype = torch.float32 if full else choose_dtype(device)  # Adam's steps would round to nothing
    quantise = load_in_4bit == "on" and not full
    if is_tiny(name):
        torch.set_num_threads(1)  # on matrices this small, threads only wait for each other
    if choose_dtype(device) == torch.float16:
        # before Ampere, SDPA runs enable_gqa in its slow math kernel: let transformers repeat keys
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
    with phase(f"loading the model {name}"):
        warnings.filterwarnings("error", "Found missing adapter keys")  # or they would be random
        adapter = adapter_config(name)
        if full and adapter:
            raise ValueError("--lora-rank 0 cannot go on from an adapter")
        if adapter and adapter.task_type != task and (task == "CAUSAL_LM" or not trainable):
            raise ValueError(f"an adapter for {adapter.task_type}, needed is one for {task}")
        kind, options = transformers.AutoModelForCausalLM, {}
        if task == "SEQ_CLS":
            kind, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
        model = kind.from_pretrained(  # eager attention overflows in fp16 on Qwen
            base_of(name), dtype=dtype, quantization_config=nf4 if quantise else None,
            device_map={"": device}, attn_implementation="sdpa", **options)
        # by hand: peft's prepare_model_for_kbit_training turns embeddings into fp32, 2 GiB at 7B
        model.requires_grad_(full)
        if adapter and adapter.task_type == task:
            model = peft.PeftModel.from_pretrained(model, find(name), is_trainable=trainable)
            if trainable and task == "CAUSAL_LM":
                model.load_adapter(find(name), "reference", is_trainable=False)
        elif trainable and not full:
            model = add_lora(model, name if adapter else None, lora_rank, task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # policy, reference and sampler must agree on a log-prob
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the GradScaler refuses fp16 gradients
        if gradient_checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        check_forward(model, task)
    return model.train(trainable)


def add_lora(model, adapter_name: str | None, rank: int, task: str):
    """New LoRA matrices on all linear layers but the head; a reward model may take an LM's."""
    new = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    config = adapter_config(adapter_name) if adapter_name else new
    config.task_type = task
    config.inference_mode = False
    config.modules_to_save = ["score"] if task == "SEQ_CLS" else None
    model = peft.get_peft_model(model, config)
    if adapter_name:
        score = model.get_base_model().score.modules_to_save["default"].weight
        load_weights(model, adapter_name, "default", {SCORE: score})
    return model


def load_weights(model, name: str, role: str, head: dict | None = None) -> dict:
    """Fills the adapter `role` from the file of `name`; what the file lacks peft leaves random."""
    weights = peft.load_peft_weights(find(name), device="cpu") | (head or {})
    missing = peft.set_peft_model_state_dict(model, weights, adapter_name=role).missing_keys
    if any(f".{role}." in key for key in missing):
        raise ValueError("its file does not hold the weights that its config names")
    check_weights(model)
    return weights


def causal_lm(model):
    """The model without peft's wrapper, LoRA layers inside: `.base_model` is all but its head."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def check_weights(model):
    """Refuses weights that are no finite numbers: a sum is finite where all are, with no copy."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if not all(p.sum(dtype=torch.float32).isfinite() for p in weights):
        raise ValueError("its weights are not finite numbers")


@torch.no_grad()
def check_forward(model, task: str):
    """Refuses broken weights, and logits changed after the head, which scripts apply themselves."""
    check_weights(model)
    causal = causal_lm(model).eval()
    input_ids = torch.arange(4, device=causal.device)[None]
    hidden = causal.base_model(input_ids=input_ids).last_hidden_state
    if task == "CAUSAL_LM":
        logits = causal(input_ids=input_ids).logits.float()
        ours = causal.get_output_embeddings()(hidden).float()
        if (logits - ours).abs().max() > 0.01 * logits.abs().max():
            raise ValueError(f"{type(causal).__name__} changes its logits after the head")


@contextlib.contextmanager
def using(model, role: str | None):
    """Inside, `model` wears the adapter `role`, or with None it is the bare base."""
    outer = model.active_adapter
    trained = [(p, p.requires_grad) for p in model.parameters()]  # peft changes them on the way
    with contextlib.nullcontext() if role else model.disable_adapter():
        if role:
            model.set_adapter(role)
        yield
    model.set_adapter(outer)
    for p, is_trained in trained:
        p.requires_grad_(is_trained)


def reference(model):
    """Inside, `model` is what training started from: the base, or a frozen copy of its adapter."""
    return using(model, "reference" if "reference" in model.peft_config else None)


def reward_config(name: str, policy: str) -> peft.PeftConfig:
    """The config of a reward model that reward_model.py saved on the base of `policy`."""
    with phase(f"loading the reward model {name}"):
        config = adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("it was not saved by reward_model.py")
        base, wanted = base_of(name), base_of(policy)
        if Path(base).resolve() != Path(wanted).resolve():
            raise ValueError(f"one base has to carry both: its is {base}, the policy's {wanted}")
        config.task_type = "CAUSAL_LM"  # its head is no part of the model that carries it
        config.modules_to_save = None
    return config


def add_role(model, name: str | None, role: str, trainable: bool = False) -> torch.nn.Linear:
    """Puts on `model` the adapter of the reward model `name`, or a new one; returns its head."""
    own = model.peft_config["default"]
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    config = peft.LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules)
    score = torch.zeros(1, causal_lm(model).config.hidden_size)
    if name:
        config = reward_config(name, own.base_model_name_or_path)
    with phase(f"loading the reward model {name} for the {role}"):
        model.add_adapter(role, config)
        if name:
            score = load_weights(model, name, role)[SCORE]
    for key, p in model.named_parameters():
        p.requires_grad_(trained.get(key, trainable))
    head = torch.nn.Linear(score.shape[1], 1, bias=False, device=model.device)
    head.weight.data.copy_(score)
    return head.requires_grad_(trainable)


def save_model(model, tokenizer, folder: Path):
    """The trained adapter, or all weights if they were trained, and the tokenizer."""
    options = {"selected_adapters": ["default"], "save_embedding_layers": False}
    model.save_pretrained(folder, **options if isinstance(model, peft.PeftModel) else {})
    tokenizer.save_pretrained(folder)


def settings(model) -> dict:
    """What was chosen for this model on this machine."""
    return {"device": str(model.device), "dtype": str(choose_dtype(model.device)),
            "load_in_4bit": bool(getattr(causal_lm(model), "is_loaded_in_4bit", False)),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


# ---- tokens --------------------------------------------------------------------------------------

def load_tokenizer(name: str):
    """The tokenizer of a model, with a pad token and an end of turn that the model can say.

    The template of a base model such as Qwen2.5-0.5B ends turns in <|im_end|>, which it was never
    trained on and which LoRA below a frozen head cannot teach it. There answers end in eos.
    """
    with phase(f"loading the tokenizer of {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(find(name))
        config = transformers.AutoConfig.from_pretrained(base_of(name))
        try:
            generation_config = transformers.GenerationConfig.from_pretrained(base_of(name))
        except OSError:  # the file is optional
            generation_config = transformers.GenerationConfig.from_model_config(config)
        longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no eos token, which ends an answer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, never from pad ids
        spoken = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
        highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, *spoken)
        if highest >= config.get_text_config().vocab_size:
            raise ValueError(f"its ids go up to {highest}, beyond the model's embeddings")
        if "strftime_now" in (tokenizer.chat_template or ""):  # or ids change with the calendar
            date = "{%- macro strftime_now(format) %}01 Jan 2025{% endmacro -%}"
            tokenizer.chat_template = date + tokenizer.chat_template
        end = end_of_turn_id(tokenizer)
        if end not in (None, *stop_token_ids(tokenizer, generation_config, template=False)):
            end_answers_with_eos(tokenizer, tokenizer.convert_ids_to_tokens(end))
            print(visible(f"{name} cannot end a turn: answers end with {tokenizer.eos_token}"))
    return tokenizer


def end_answers_with_eos(tokenizer, end_token: str):
    """Rewrites the template: the first end of turn behind each assistant header becomes eos."""
    question = [{"role": "user", "content": "Q"}]
    plain = tokenizer.apply_chat_template(question, tokenize=False)
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    header = asked.removeprefix(plain)
    tokenizer.chat_template = (
        f"{{%- set chat %}}{tokenizer.chat_template}{{%- endset %}}{{%- set header = {header!r} %}}"
        "{%- for part in chat.split(header) %}{{ part if loop.first else header + "
        f"part.replace({end_token!r}, {tokenizer.eos_token!r}, 1) }}}}{{%- endfor %}}")


def end_of_turn_id(tokenizer) -> int | None:
    """The special token with which the chat template closes an assistant turn, if it has one."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def stop_token_ids(tokenizer, generation_config, template: bool = True) -> list[int]:
    """Every token that ends an answer: eos, the model's own ones, the template's end of turn."""
    own = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({*ids, end_of_turn_id(tokenizer) if template else None} - {None})


def render(tokenizer, messages: list, tools=None, add_generation_prompt=False) -> str:
    """A conversation as text. A special token that messages or tools spell is broken by QUOTE."""
    for message in messages:
        keys = message.keys() if isinstance(message, dict) else set()
        if "role" not in keys or not {"content", "tool_calls"} & keys:
            raise ValueError(f"a message needs a role, and content or tool_calls, not {message}")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    quoted = re.sub("|".join(map(re.escape, special)), lambda x: x[0][0] + QUOTE + x[0][1:],
                    json.dumps([messages, tools], ensure_ascii=False))
    messages, tools = json.loads(quoted)
    return tokenizer.apply_chat_template(
        [{"content": ""} | message for message in messages], tools=tools,
        add_generation_prompt=add_generation_prompt, tokenize=False)


def to_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a rendered conversation, in which what QUOTE breaks is mere text."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(QUOTE)]
    return list(itertools.chain(*parts))


def shared_length(a: list, b: list) -> int:
    """How many items two lists have in common at their start."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def encode_prompt(tokenizer, prompt: str | list, tools=None) -> list[int]:
    """The token ids up to the point where the model answers."""
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError("a prompt must be a text or a list of messages")
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return to_ids(tokenizer, render(tokenizer, prompt, tools, add_generation_prompt=True))


def encode(tokenizer, prompt: str | list, answer: str | list, tools=None) -> list[list]:
    """Two texts or lists of messages as examples, each a list of pieces (ids, is_answer).

    That is one example, unless the template rewrites earlier turns once others follow (Qwen3 drops
    their thoughts): then it is one for each turn of the assistant, as it is when the model answers.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return [encode_text(tokenizer, prompt, answer)]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError("prompt and answer must both be texts or both lists of messages")
    chat, first = prompt + answer, len(prompt)
    roles = [message.get("role") if isinstance(message, dict) else None for message in chat]
    turns = [i for i in range(first, len(chat)) if roles[i] == "assistant"]
    if not turns:
        raise ValueError("there is no answer of the assistant")
    try:
        return [encode_chat(tokenizer, chat[:turns[-1] + 1], turns, tools)]
    except ValueError:
        if len(turns) == 1:
            raise
        return [encode_chat(tokenizer, chat[:turn + 1], [turn], tools) for turn in turns]


def encode_text(tokenizer, prompt: str, answer: str) -> list[tuple[list[int], bool]]:
    """Prompt and answer, with eos at its end, once."""
    if not answer:
        raise ValueError("the answer is empty")
    # one text, as tokenizers may treat its start specially; a token may span the border
    ids = tokenizer(prompt + answer)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    border = shared_length(tokenizer(prompt)["input_ids"], ids)
    return [(ids[:border], False), (ids[border:], True)]


def encode_chat(tokenizer, chat: list, turns: list[int], tools) -> list[tuple[list[int], bool]]:
    """A conversation as pieces; an answer goes from behind its header through its end token."""
    ids = to_ids(tokenizer, render(tokenizer, chat, tools))
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    pieces, done = [], 0
    for turn in turns:
        asked = render(tokenizer, chat[:turn], tools, add_generation_prompt=True)
        answered = render(tokenizer, chat[:turn + 1], tools)
        after = to_ids(tokenizer, answered) if turn + 1 < len(chat) else ids
        # before a token that spans the header's and the answer's newlines
        start = shared_length(to_ids(tokenizer, asked), after)
        stops = [i for i in range(start, len(after)) if after[i] in ends]
        stop = stops[0] + 1 if stops else len(after)  # generation ends there
        if not answered.startswith(asked) or ids[:stop] != after[:stop]:
            raise ValueError(f"the chat template rewrites message {turn + 1} once others follow")
        said = tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()
        if not said or not any(chat[turn].get(key) for key in ("content", "tool_calls")):
            raise ValueError(f"the chat template prints nothing of message {turn + 1}")
        pieces += [(ids[done:start], False), (ids[start:stop], True)]
        done = stop
    return pieces


def encode_preference(tokenizer, row: dict) -> tuple[list, list]:
    """Chosen and rejected, each as pieces: the prompt (a column, or how both begin), the answer."""
    prompt, answers = row.get("prompt", ""), [row.get("chosen"), row.get("rejected")]
    if not all(answers) or answers[0] == answers[1]:
        raise ValueError("chosen and rejected must be two different answers")
    if isinstance(answers[0], list):
        if not prompt or isinstance(prompt, str):  # UltraFeedback repeats it as a text
            prompt = answers[0][:shared_length(*answers)]
        length = len(prompt)
        answers = [answer[length:] if answer[:length] == prompt else answer for answer in answers]
    sides = [encode(tokenizer, prompt, answer, row.get("tools")) for answer in answers]
    if len(sides[0]) > 1 or len(sides[1]) > 1:
        raise ValueError("the chat template rewrites turns of the answer once others follow")
    chosen, rejected = sides[0][0], sides[1][0]
    if not prompt and isinstance(answers[0], str):  # half a word gives other tokens than a whole
        texts = [asked + answer for (asked, _), (answer, _) in (chosen, rejected)]
        border = shared_length(*texts)
        chosen, rejected = ([(ids[:border], False), (ids[border:], True)] for ids in texts)
    shared = shared_length(chosen[0][0], rejected[0][0])
    if not 0 < shared == min(len(chosen[0][0]), len(rejected[0][0])) or not chosen[1][0]:
        raise ValueError("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same tokens")
    return chosen, rejected


def show(tokenizer, input_ids: list[int], loss_mask: list[int]):
    """Prints an example as the model sees it, in green where the mask is 1."""
    for trained, group in itertools.groupby(zip(input_ids, loss_mask, strict=True), lambda x: x[1]):
        text = visible(tokenizer.decode([token for token, _ in group]))
        print(f"\033[32m{text}\033[0m" if trained else text, end="")
    print()


# ---- rows ----------------------------------------------------------------------------------------

def load_rows(source: str, split: str, limit: int, seed: int) -> list[dict]:
    """The rows of a file, or up to `limit` random ones of a Hub dataset, NAME or NAME:CONFIG."""
    with phase(f"reading {source}"):
        if file_type := FORMATS.get(Path(source).suffix.lower()):
            rows = datasets.load_dataset(file_type, data_files=find(source), split="train")
        else:
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split).shuffle(seed=seed)
            rows = rows.select(range(min(limit, len(rows))))
        return [without_nones(row) for row in rows]


def without_nones(value):
    """`datasets` gives every row the keys of all others; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def encode_rows(source: str, rows: list[dict], make, tokenizer, max_length: int) -> list[dict]:
    """What `make` makes of the rows: an example each, or a list of them. It may refuse a row."""
    encoded, refused = [], []
    for place, row in enumerate(rows, 1):
        try:
            made = make(row, tokenizer, min(max_length, tokenizer.model_max_length))
            encoded.append(made if isinstance(made, list) else [made])
        except Exception as error:  # templates and tokenizers raise types of their own
            refused.append(f"row {place}: {error}")
    examples = list(itertools.chain(*encoded))
    report = f"{source}: {len(rows)} rows, {len(examples)} examples"
    if divided := sum(len(several) > 1 for several in encoded):
        report += f"; {divided} rows became one per answer"
    if refused:
        report += f"; {len(refused)} rows cannot be used, the first is {refused[0]}"
    if not examples:
        fail(f"{report}; columns: {', '.join(rows[0]) if rows else 'none'}")
    print(f"{visible(report):.500}")
    return examples


def load_examples(args, make, tokenizer, limit: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples; without --eval-dataset at most a fifth, no prompt in both."""
    if args.eval_dataset and Path(args.eval_dataset).resolve() == Path(args.dataset).resolve():
        fail(f"--eval-dataset {args.dataset} is what is trained on: without it, some is held out")
    rows = load_rows(args.dataset, args.split, limit + args.eval_size, args.seed)
    examples = encode_rows(args.dataset, rows, make, tokenizer, args.max_length)
    if args.eval_dataset:
        rows = load_rows(args.eval_dataset, args.split, args.eval_size, args.seed)[:args.eval_size]
        return examples, encode_rows(args.eval_dataset, rows, make, tokenizer, args.max_length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed))
    held_out = [examples[i] for i in order[:min(args.eval_size, len(examples) // 5)]]
    prompts = {tuple(example["prompt"]) for example in held_out}
    training = [example for example in examples if tuple(example["prompt"]) not in prompts]
    if not training or not held_out:
        fail("too few different prompts to hold some out: add rows, or name an --eval-dataset")
    return training, held_out
