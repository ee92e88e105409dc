"""Wrong inputs: each is one line on stderr that names the value, the rule and the way out, and an exit code.

Everything goes through the real entry, run_exp.py as a program in this process; 2 is for what was wrongly asked
for, 1 for what failed on the way.
"""

import fcntl
import gzip
import json
import logging
import random
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from lora_one import models
from lora_one.errors import RunError
from lora_one.evaluation.command import main as evaluate
from lora_one.evaluation.functional_correctness import main as score_samples
from lora_one.records.folder import folder_of
from lora_one.records.provenance import config_hash, local_fingerprints
from tests.helpers.paths import ROOT
from tests.helpers.runs import small_run

USAGE, FAILURE = 2, 1
HEAD = "model=tiny model.type=SequenceClassification dataset=cola "
CHAT = "dataset=chat model=tiny dataset.path={files}/gsm8k.jsonl "
JSON = "dataset=json model=tiny dataset.path={files}/"
EVAL = "--data_path={files}/gsm8k.jsonl --output_dir={results}"

# Refused from the configuration alone: no model, no run folder. arguments, then what the line says, in order.
CONFIGURATION = [
    # keys
    ("++init.gama=1", "unknown key init.gama", "did you mean init.stable_gamma?"),
    ("init.foo=1", "unknown key init.foo", "valid: bound, bsz, cache, corda_method"),
    ("peft.lora_rr=4", "unknown key peft.lora_rr", "did you mean peft.lora_r?"),
    ("fooo=1", "unknown key fooo", "valid: dataset, dry_run, init"),
    ("++sed=1", "unknown key sed", "did you mean seed?"),
    ("init=default init.direction=LoRA-One", "unknown key init.direction", "another choice of init", "drop it"),
    ("init=default ++init.bsz=4", "unknown key init.bsz", "valid: cache, dtype, lora_A"),
    ("optimizer=sgd ++optimizer.eps=1", "unknown key optimizer.eps", "valid: momentum, name"),
    ("~init", "init is missing", "set init="),
    ("~model.epochs", "model.epochs is missing", "set model.epochs="),
    ("model.name=???", "model.name has no default", "set model.name=<value>"),
    # group choices
    ("init=foo", "init=foo is not a choice of conf/init", "valid: corda, default, eva, full_step, gaussian"),
    ("dataset=gsm9k", "dataset=gsm9k", "did you mean gsm8k? valid: alpaca, alpaca_gpt4, arithmetic"),
    ("++dataset_name=gsm9k", "dataset=gsm9k", "did you mean gsm8k?"),
    ("peft=", "peft= is not a choice of conf/peft", "valid: adalora, all, all_w_emb, dora, full_ft"),
    ("init=null", "init=null", "the value of a group is the name of a file in conf/"),
    ("dataset.name=gsm9k", "dataset.name=gsm9k is not a data set", "did you mean gsm8k?"),
    ("init.mode=gradiant", "init.mode=gradiant is not a choice", "did you mean gradient?"),
    ("init=pissa init.method=pisa", "init.method=pisa is not an initialisation;", "did you mean pissa?"),
    ("init=pissa init.bsz=4", "unknown key init.bsz", "another choice of init= reads it (lora_one, ", "drop it"),
    ("init=lora_da init.scale=search", "unknown key init.scale", "(lora_one, lora_ga, svd, lora_ga_peft)", "drop it"),
    ("optimizer=lora_muon optimizer.betas=[0.9,0.9]", "unknown key optimizer.betas", "(adamw, ", "drop it"),
    ("init=gora init.min_rank=40", "init.min_rank=40 is larger than init.max_rank=32", "lower it"),
    ("optimizer.name=adam", "optimizer.name=adam is not an optimizer", "did you mean adamw?"),
    # quantised bases
    ("model.quantization=nf5", "model.quantization=nf5 is not a choice", "did you mean nf4?"),
    ("init=loftq", "init=loftq compensates the quantisation error of the base", "add model.quantization=nf4"),
    ("init=svd model.quantization=nf4", "svd changes the base weights", "model.quantization=nf4: set init="),
    ("init=milora model.quantization=nf4", "MiLoRA changes the base weights", "quantization=null"),
    ("init=random_ab model.quantization=nf4", "Init[AB] changes the base weights", "quantization=null"),
    (
        "init=gaussian init.lora_B=gaussian model.quantization=nf4",
        "LoRA changes the base weights",
        "=nf4: set init=",
    ),
    ("init.direction=LoRA-GA model.quantization=int8", "LoRA-GA changes the base weights", "quantization=null"),
    ("peft=dora model.quantization=int8", "peft.dora=True needs the norms", "set model.quantization=nf4"),
    # the start
    ("init.shuffle=direction", "init.shuffle=direction is not a choice", "did you mean directions?"),
    ("init.direction=LoRA-GA init.shuffle=spectrum", "init.shuffle=spectrum is used only by LoRA-One", "remove it"),
    ("init=gora init.min_rank=0", "init.min_rank=0 is out of range", "a layer rank 0, which has no adapter"),
    ("init=random_ab init.bound=0", "init.bound=0.0 is out of range", "positive"),
    ("init.scale=search init.direction=LoRA-GA", "init.scale=search compares the loss", "set init.scale=stable"),
    (
        "init.scale=search init.stable_gamma=4",
        "init.stable_gamma=4.0 is used only with init.scale=stable",
        "remove one",
    ),
    ("peft=dora init=lora_xs", "peft.dora=True trains magnitudes", "LoRA-XS trains only R", "remove peft=dora"),
    (
        "optimizer=scaled",
        "optimizer=scaled is not a choice of conf/optimizer",
        "did you mean scaled_gd?",
        "scaled_adamw",
    ),
    ("optimizer=scaled_gd ++optimizer.eps=1", "unknown key optimizer.eps", "valid: damping, momentum, name, order"),
    # the form of an argument
    ("model.epochs", "model.epochs cannot be parsed", "write key=value"),
    ("model.epochs=[1", "model.epochs=[1 cannot be parsed", "write key=value"),
    ("=3", "=3: the value of a group is the name of a file"),
    ("seed=${foo}", "seed: Interpolation key 'foo' not found", "set a value"),
    # types
    ("model.learning_rate=abc", "model.learning_rate='abc' has the wrong type", "must be float"),
    ("seed=a", "seed='a' has the wrong type", "must be int"),
    ("seed=null", "seed=null has the wrong type", "must be int"),
    ("peft.lora_r=8.5", "peft.lora_r=8.5 has the wrong type", "must be int"),
    ("model.bf16=maybe", "model.bf16='maybe' has the wrong type", "must be bool"),
    ("optimizer.betas=3", "optimizer.betas=3 has the wrong type", "list"),
    # ranges
    ("seed=-1", "seed=-1", "an integer in [0, 2^32)"),
    ("init.seed=-4", "init.seed=-4", "an integer in [0, 2^32)"),
    ("peft.lora_r=0", "peft.lora_r=0 is out of range", "at least 1"),
    ("model.learning_rate=-1", "model.learning_rate=-1.0 is out of range", "positive"),
    ("model.learning_rate=nan", "model.learning_rate=nan is out of range", "positive"),
    ("peft.lora_dropout=1", "peft.lora_dropout=1.0 is out of range", "in [0, 1)"),
    ("model.warmup=1.5", "model.warmup=1.5", "a fraction below 1 or a number of steps"),
    ("model.warmup=-3", "model.warmup=-3.0", "a fraction below 1 or a number of steps"),
    ("model.warmup=nan", "model.warmup=nan", "a fraction below 1 or a number of steps"),
    ("model.warmup=inf", "model.warmup=inf", "a fraction below 1 or a number of steps"),
    ("model.epochs=-1", "model.epochs=-1.0", "0 (initialise only) or more"),
    ("init=gaussian init.lora_A_std=inf", "init.lora_A_std=inf", "not negative"),
    ("init=pissa init.niter=-1", "init.niter=-1", "not negative"),
    ("init=eva init.tau=1", "init.tau=1.0", "in [0, 1)"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "two numbers in [0, 1)"),
    ("optimizer.eps=-1", "optimizer.eps=-1.0", "positive"),
    ("optimizer=scaled_gd model.prec_reg=-1e-6", "model.prec_reg=-1e-06 is out of range", "not negative"),
    ("optimizer=scaled_adamw model.prec_reg=inf", "model.prec_reg=inf is out of range", "not negative"),
    ("optimizer=sgd optimizer.momentum=3", "optimizer.momentum=3.0", "in [0, 1)"),
    # choices
    ("init.direction=LoRA-0ne", "init.direction=LoRA-0ne is not a choice", "did you mean LoRA-One?"),
    ("init.scale=stabel", "init.scale=stabel is not a choice", "did you mean stable? valid: gd"),
    ("++init.weight=stabel", "init.scale=stabel is not a choice", "did you mean stable?"),
    ("init=corda init.corda_method=imp", "init.corda_method=imp is not a choice", "did you mean ipm?"),
    ("init=lora_ga_peft init.scale=weight_svd", "init.scale=weight_svd is not a choice", "valid: gd, stable, unit"),
    ("optimizer=scaled_gd optimizer.damping=relativ", "optimizer.damping=relativ is not a choice", "mean relative?"),
    ("optimizer=scaled_gd optimizer.order=seq", "optimizer.order=seq is not a choice", "valid: sequential, simultan"),
    ("model.scheduler=cosin", "model.scheduler=cosin is not a choice", "did you mean cosine?"),
    # values together
    (
        "model.real_batch_size=30 model.per_device_batch_size=32",
        "model.real_batch_size=30 is not divisible",
        "=32",
        "multiple of 32",
    ),
    ("peft.lora_target_modules=q_proj", "='q_proj' must be all, or a list", "[q_proj,v_proj]"),
    ("peft.lora_target_modules=[]", "=[] must be all, or a list", "[q_proj,v_proj]"),
    (
        "optimizer=scaled_gd init=lora_xs",
        "optimizer=scaled_gd preconditions the gradients of B and A",
        "trains only R",
        "optimizer=adamw",
    ),
    *[
        (
            f"optimizer={name} {start}",
            f"optimizer={name} steps B and A together, but",
            "trains only R: set optimizer=adamw",
        )
        for name in ("lora_pro", "lora_muon", "lora_rite")
        for start in ("init=lora_sb", "init=lora_xs")
    ],
    *[
        (
            f"optimizer={name} peft.use_loraplus=true",
            "learning rate for B, but",
            f"optimizer={name} steps B and A together",
        )
        for name in ("lora_pro", "lora_muon", "lora_rite")
    ],
    ("peft=full_ft optimizer=lora_pro", "optimizer=lora_pro works only with adapters", "remove one of the two"),
    (
        "peft=adalora optimizer=lora_muon",
        "optimizer=lora_muon works only with adapters of two factors",
        "one of the two",
    ),
    ("optimizer=lora_rite ++optimizer.momentum=1", "unknown key optimizer.momentum", "valid: betas, eps, max_norm"),
    ("optimizer=lora_muon optimizer.momentum=1", "optimizer.momentum=1.0 is out of range", "in [0, 1)"),
    ("optimizer=lora_muon optimizer.damping=0", "optimizer.damping=0.0 is out of range", "fp32 cannot decompose"),
    ("optimizer=lora_muon optimizer.sign_steps=0", "optimizer.sign_steps=0 is out of range", "at least 1"),
    ("optimizer=lora_muon optimizer.others_lr=0", "optimizer.others_lr=0.0 is out of range", "positive"),
    ("optimizer=lora_rite optimizer.max_norm=-1", "optimizer.max_norm=-1.0 is out of range", "no limit"),
    (
        "optimizer=lora_muon model.learning_rate=0.5 model.weight_decay=2",
        "optimizer=lora_muon multiplies B A by 1 - weight_decay x learning_rate",
        "lower one of them",
    ),
    ("optimizer=scaled_adamw init.direction=LoRA-SB", "optimizer=scaled_adamw", "LoRA-SB trains only R", "=adamw"),
    ("init.do_subsampling=true", "init.do_subsampling=true needs the number of examples", "set init.sub_size="),
    ("init.sub_size=3", "init.sub_size=3 is used only with", "remove init.sub_size"),
    ("init.iters=null", "init.iters=None", "set both"),
    ("init=eva init.iters=null", "init.iters=None", "set both"),
    ("init=lora_ga_peft init.scale=unit init.stable_gamma=3", "init.stable_gamma=3.0", "only with init.scale=stable"),
    ("init.direction=LoRA-GA init.normalize=none", "init.normalize=none is used only by LoRA-One", "remove it"),
    ("init=svd init.scale=gd", "init.scale=gd is not a choice of init=svd", "valid: default"),
    ("init.scale=unit init.stable_gamma=3", "init.stable_gamma=3.0", "only with init.scale=stable", "remove one"),
    ("dataset.train_size=null", "dataset.train_size=null", "set dataset.train_size="),
    # data, model and folder, looked at before anything is read
    ("dataset=json", "dataset=json needs a local file", "add dataset.path="),
    ("dataset=gsm8k dataset.path={files}/no.jsonl", "/no.jsonl does not exist", "set it to an existing file or folder"),
    ("model.name={files}/nowhere", "/nowhere: there is no such folder", "a hub id, or bundled/tiny"),
    ("model.name=bundled/huge", "model.name=bundled/huge: there is no such folder", "bundled/tiny"),
    ("model.name={files}/empty", "/empty has no config.json", "pass a Hugging Face model folder"),
    (
        "model.name={files}/no-weights",
        "/no-weights has a config.json but no weights",
        "download them",
        "or pass another",
    ),
    (
        "model.name={files}/model.gguf",
        "/model.gguf: a single file, such as a GGUF",
        "pass a Hugging Face model folder",
    ),
    ("model.name=nobody/model-Q4.gguf", "model-Q4.gguf: a single file, such as a GGUF", "gguf_file=<file>"),
    ("model=llama dataset=gsm8k", "Llama-2-7b-hf has about 7B parameters", "without an accelerator", "model=tiny"),
    ("wandb.name=a/b", "wandb.name='a/b'", "must not", "contain a slash"),
    ("wandb.project=..", "wandb.project='..'", "the name of a folder"),
    ("wandb.diagnostics_every=-1", "wandb.diagnostics_every=-1 is out of range", "0 (never) or a number of steps"),
    (
        "peft=full_ft wandb.diagnostics_every=1",
        "wandb.diagnostics_every=1 works only with adapters",
        "remove one of the two",
    ),
    ("wandb.curvature_examples=-1", "wandb.curvature_examples=-1 is out of range", "0 (not measured) or a number"),
    ("wandb.curvature_by_layer=true", "curvature_by_layer=True needs the number of examples", "curvature_examples="),
    (
        "wandb.curvature_examples=4 model.sharded=true",
        "wandb.curvature_examples=4 needs second derivatives",
        "model.sharded=True does not have",
    ),
    ("init=lora_da init.damping=-1", "init.damping=-1.0 is out of range", "not negative"),
    ("init=lora_da init.da_alpha=0", "init.da_alpha=0.0 is out of range", "positive"),
    ("wandb.diagnostics_every=often", "wandb.diagnostics_every='often' has the wrong type", "must be int"),
    ("results_dir=", "results_dir='' is not a folder", "set results_dir="),
    ("results_dir=null", "results_dir=null is not a folder", "set results_dir="),
    (
        "dataset.decontaminate=gsm9k",
        "gsm9k is neither an existing file or folder",
        "did you mean gsm8k? valid: gsm8k, humaneval",
    ),
    ("dataset.cache=false", "dataset.cache=False must be a folder", "null to cache nothing"),
    # kinds of models, what trains, seeds, several processes
    ("model.type=Seq2SeqLM", "model.type=Seq2SeqLM is not a choice", "valid: CausalLM, ConditionalGeneration"),
    (
        "model.type=SequenceClassification",
        "needs a data set with classes, which dataset=arithmetic does not have",
        "one of boolq",
    ),
    (
        HEAD + "dataset.train_on_inputs=true",
        "dataset.train_on_inputs=True",
        "model.type=SequenceClassification only reads",
    ),
    ("dataset=mrpc model=t5base dataset.train_on_inputs=true", "dataset.train_on_inputs=True", "model.type=CausalLM"),
    ("dataset=chat", "dataset=chat needs a local file", "add dataset.path="),
    (CHAT + "model.type=ConditionalGeneration", "only causal models are trained on", "use model.type=CausalLM"),
    (CHAT + "dataset.chat_template=false", "dataset.chat_template=False turns off", "leave that key out"),
    (
        HEAD + "dataset.chat_template=true",
        "dataset.chat_template=True formats prompts",
        "set dataset.chat_template=false",
    ),
    (
        HEAD + "model.quantization=nf4",
        "model.quantization=nf4 would also quantise the new classification head",
        "model.quantization=null",
    ),
    (HEAD + "model.sharded=true dataset.accuracy_examples=0", "only causal models can be sharded"),
    (
        "peft=full_ft init=gradient",
        "peft.use_peft=False trains every weight, so there are no adapters that LoRA-One could initialise",
        "remove init=",
    ),
    ("peft=full_ft init=pissa", "trains every weight, so there are no adapters that pissa could", "remove init="),
    ("init=full_step", "init=full_step changes the weights and initialises no adapters", "add peft=full_ft"),
    ("peft=full_ft peft.dora=true", "peft.dora=True works only with adapters", "remove one of the two"),
    ("peft=full_ft peft.use_loraplus=true", "peft.use_loraplus=True works only with adapters", "remove one of the two"),
    (
        "peft=full_ft peft.lora_relative_r=0.5",
        "peft.lora_relative_r=0.5 works only with adapters",
        "remove one of the two",
    ),
    ("peft=full_ft model.quantization=nf4", "model.quantization=nf4 works only with adapters", "remove one of the two"),
    ("peft=full_ft optimizer=scaled_gd", "optimizer=scaled_gd works only with adapters", "remove one of the two"),
    (
        "peft=adalora init=gradient",
        "peft.adalora=True has its own initialisation and cannot use LoRA-One",
        "remove init=",
    ),
    ("peft=adalora peft.dora=true", "peft.dora=True works only with adapters of two factors", "remove one"),
    (
        "peft=adalora peft.use_loraplus=true",
        "peft.use_loraplus=True works only with adapters of two factors",
        "remove one",
    ),
    (
        "peft=adalora optimizer=scaled_adamw",
        "optimizer=scaled_adamw works only with adapters of two factors",
        "remove one",
    ),
    (
        "peft=adalora wandb.diagnostics_every=5",
        "wandb.diagnostics_every=5 works only with adapters of two factors",
        "remove one",
    ),
    (
        "peft=all_w_emb model=t5base dataset=cola",
        "peft.train_embeddings=True does not work with an encoder-decoder",
        "peft=full_ft",
    ),
    ("init=eva model=t5base dataset=cola", "init=eva works only with causal models", "set init=pissa"),
    (
        "peft=all_w_emb model.sharded=true dataset.accuracy_examples=0",
        "peft.train_embeddings=True (untested)",
        "remove one",
    ),
    ("peft.lora_relative_r=1.5", "peft.lora_relative_r=1.5 is out of range", "in (0, 1]"),
    ("peft.lora_relative_r=0", "peft.lora_relative_r=0.0 is out of range", "in (0, 1]"),
    ("model.seed=4294967296", "model.seed=4294967296 is out of range", "an integer in [0, 2^32)"),
    ("model.order_seed=-1", "model.order_seed=-1 is out of range", "an integer in [0, 2^32)"),
    ("model.order_seed=first", "model.order_seed='first' has the wrong type", "must be int or null"),
    ("model.keep_epochs=last", "model.keep_epochs='last' has the wrong type", "must be bool"),
    (
        "model.sharded=true",
        "model.sharded=True does not work with dataset.accuracy_examples=",
        "set dataset.accuracy_examples=0",
    ),
]

# Found when data, names and shapes are read; still before any weight, and nothing is on record.
READING = [
    ("dataset.families=[gian]", USAGE, "dataset.families: gian is not a family", "did you mean gain?"),
    ("dataset.families=[]", USAGE, "dataset.families=[]", "must name at least one of gain"),
    (
        "init.direction=LoRA-GA peft.lora_r=65",
        USAGE,
        "peft.lora_r=65 x 2",
        "exceeds the smaller dimension 128",
        "lower peft.lora_r",
    ),
    (
        "init=lora_ga_peft peft.lora_r=65",
        USAGE,
        "peft.lora_r=65 x 2 (lora_ga_peft needs 2 r vectors)",
        "lower peft.lora_r",
    ),
    (
        "init=loram peft.lora_r=1",
        USAGE,
        "peft.lora_r=1 gives zero factors with init=loram",
        "set peft.lora_r=2 or more",
    ),
    (
        "init.shuffle=spectrum peft.lora_r=1",
        USAGE,
        "init.shuffle=spectrum changes the order of peft.lora_r=1 singular value",
        "init.shuffle=directions",
    ),
    (
        "init=gora peft.lora_r=3",
        USAGE,
        "peft.lora_r=3 is the mean rank that the budget of init=gora pays for",
        "[init.min_rank=4, init.max_rank=32]: change one of the three",
    ),
    (
        "peft.lora_r=5000",
        USAGE,
        "peft.lora_r=5000 exceeds the smaller dimension 128 of model.layers.0",
        "lower peft.lora_r",
    ),
    ("peft.lora_target_modules=[q_prj]", USAGE, "q_prj matches no linear layer", "did you mean q_proj?"),
    (
        "dataset.chat_template=true",
        USAGE,
        "dataset.chat_template=true",
        "no chat template",
        "dataset.chat_template=false",
    ),
    (
        JSON + "word.jsonl model.name={files}/grown",
        USAGE,
        "token id 425, but the model has only 425 embeddings",
    ),
    (
        JSON + "json.jsonl model.name={files}/grown-padding",
        USAGE,
        "token id 425, but the model has",
        "resize",
    ),
    ("model.max_length=4", FAILURE, "none of the 48 examples", "max_length=4", "increase model.max_length"),
    ("dataset.max_tokens=2", FAILURE, "dataset.max_tokens=2", "increase dataset.max_tokens"),
    (JSON + "gsm8k.jsonl", USAGE, "no column prompt, response; its columns are question, answer", "dataset.prompt="),
    (JSON + "hello.txt", USAGE, "hello.txt has an unknown format", "json, jsonl, csv"),
    (
        JSON + "untrained",
        USAGE,
        "no file whose name begins with 'train'",
        "contains test.jsonl",
        "pass the path of the file",
    ),
    (JSON + "twice", USAGE, "several files for 'train' (train.csv, train.jsonl)", "pass the path of one of them"),
    (JSON + "empty.jsonl", FAILURE, "empty.jsonl has no rows", "pass a file with examples"),
    (JSON + "empty.jsonl.gz", FAILURE, "empty.jsonl.gz has no rows", "pass a file with examples"),
    (JSON + "header.csv", FAILURE, "header.csv has no rows", "pass a file with examples"),
    (JSON + "random.jsonl", FAILURE, "random.jsonl cannot be read as json", "check the file"),
    (JSON + "cut.jsonl", FAILURE, "/cut.jsonl cannot be read as json", "line 2", "check the file"),
    (JSON + "cut.jsonl.gz", FAILURE, "cut.jsonl.gz cannot be read as json", "check the file"),
    ("dataset=gsm8k model=tiny", FAILURE, "openai/gsm8k cannot be loaded from the hub", "dataset.path="),
    ("model.name=nobody/nothing", FAILURE, "model nobody/nothing cannot be loaded", "pass a local folder"),
    (
        "init.bsz=10 init.iters=10",
        USAGE,
        "init.bsz x init.iters=100 exceeds the number of training examples, 48",
        "lower it",
    ),
    (
        "init=eva init.iters=7",
        USAGE,
        "init.bsz x init.iters=56 exceeds the number of training examples, 48",
        "lower it",
    ),
    (
        "init.do_subsampling=true init.sub_size=49",
        USAGE,
        "init.sub_size=49 exceeds the number of training examples, 48",
        "lower it",
    ),
    ("init=lora_da", USAGE, "init.bsz x init.iters=256 exceeds the number of training examples, 48", "lower it"),
    (
        "init=lora_da dry_run=true",
        USAGE,
        "init.bsz x init.iters=256 exceeds the number of training examples",
        "lower it",
    ),
    (
        "wandb.curvature_examples=49",
        USAGE,
        "wandb.curvature_examples=49 exceeds the number of training",
        "48: lower it",
    ),
    ("init.max_length=3", FAILURE, "max_length=3", "init.max_length"),
    ("dataset.train_size=3000000", USAGE, "size=3000008 exceeds the maximum of 100000 per family", "lower it"),
    ("model.name={files}/cut-header", FAILURE, "not a valid safetensors file", "download it again"),
    ("dataset.decontaminate=humaneval", FAILURE, "openai_humaneval cannot be loaded", "dataset.decontaminate="),
    ("dataset.decontaminate={files}/header.csv", FAILURE, "header.csv has no rows", "pass a file with examples"),
    (
        "dataset.decontaminate={files}/empty",
        USAGE,
        "no file whose name begins with 'test'",
        "pass the path of the file",
    ),
    ("model.type=ConditionalGeneration", USAGE, "is not possible for bundled/tiny", "use model.type=CausalLM"),
    (HEAD + "dataset.path={files}/json.jsonl", USAGE, "no column sentence, label; its columns are prompt, response"),
    (HEAD + "dataset.path={files}/labels.tsv", USAGE, "row 2: the label '7' is not one of", "with labels"),
    (
        HEAD + "dataset.path={files}/words.tsv model.max_length=2 init.bsz=4 init.iters=4",
        USAGE,
        "exceeds the number of training examples, 2",
        "lower",
    ),
]

EVALUATION = [
    ("", USAGE, "nothing to evaluate", "--model_name="),
    ("--model_name=bundled/tiny --limit=0", USAGE, "--limit=0 must be at least 1"),
    ("--model_name=bundled/tiny --temperature=0", USAGE, "--temperature=0.0 must be a positive number", "leave it out"),
    ("--model_name=bundled/tiny --top_p=0.5", USAGE, "--top_p=0.5", "needs --temperature"),
    ("--model_name=bundled/tiny --data_path={files}/no", USAGE, "--data_path=", "/no does not exist"),
    ("--adapter={files}/empty " + EVAL, USAGE, "/empty has no adapter_config.json", "adapter/ folder of a run"),
    ("--model_name={files}/nowhere " + EVAL, USAGE, "/nowhere: there is no such folder", "a hub id"),
    ("--model_name={files}/model.gguf " + EVAL, USAGE, "model.gguf: a single file", "model folder"),
    ("--model_name={files}/no-weights " + EVAL, USAGE, "/no-weights has a config.json but no weights", "download them"),
    (
        "--model_name={files}/grown --data_path={files}/word-gsm8k.jsonl --output_dir={results}",
        USAGE,
        "token id 425, but the model has only 425 embeddings",
        "resize_token_embeddings",
    ),
    ("--rescore={files}/random.jsonl", USAGE, "random.jsonl is not a text file", "predictions.jsonl"),
    ("--rescore={files}/empty", USAGE, "/empty is not a file", "predictions.jsonl"),
    (
        "--model_name=bundled/tiny --temperature=nan",
        USAGE,
        "--temperature=nan must be a positive number",
        "leave it out",
    ),
    ("--rescore={files}/gsm8k.jsonl", USAGE, "gsm8k.jsonl, line 1 is not a prediction", "required are id, prompt"),
    (
        "--model_name=bundled/tiny --data_path={files}/json.jsonl",
        USAGE,
        "no column question, answer",
        "its columns are prompt",
    ),
    ("--model_name=bundled/tiny --data_path={files}/cut.jsonl.gz", FAILURE, "cannot be read as json", "check the file"),
]

MODEL = "--model_name=bundled/tiny --data_path={files}/problems.jsonl "
HUMANEVAL = [
    (MODEL + "--num_sample=0", USAGE, "--num_sample=0 must be at least 1", "leave it out"),
    (MODEL + "--timeout=0", USAGE, "--timeout=0.0 must be greater than 0", "the published limit is 3"),
    (MODEL + "--timeout=nan", USAGE, "--timeout=nan must be greater than 0"),
    (MODEL + "--memory_mb=8", USAGE, "--memory_mb=8 must be at least 64"),
    (MODEL + "--workers=0", USAGE, "--workers=0 must be at least 1", "leave it out"),
    ("--rescore={files}/json.jsonl --no_score", USAGE, "--no_score and --rescore exclude each other", "drop one"),
    ("--rescore={files}/json.jsonl --num_sample=2", USAGE, "--num_sample has no effect with --rescore", "leave it out"),
    (
        "--rescore={files}/json.jsonl --unsafe",
        USAGE,
        "json.jsonl, line 1 is not a prediction",
        "required are id, prompt",
    ),
    (
        "--model_name=bundled/tiny --data_path={files}/json.jsonl --unsafe",
        USAGE,
        "no column task_id",
        "its columns are prompt",
    ),
    ("--model_name=bundled/tiny --data_path={files}/twice.jsonl --unsafe", USAGE, "contains the task_id Mine/0 twice"),
]

PROBLEMS = "--data_path={files}/problems.jsonl "
SAMPLES = [
    (PROBLEMS + "--sample_file={files}/no.jsonl", USAGE, "--sample_file=", "/no.jsonl is not a file", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/empty.jsonl", USAGE, "has no samples", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/random.jsonl", FAILURE, "random.jsonl cannot be read", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/cut.jsonl.gz", FAILURE, "cut.jsonl.gz cannot be read", "samples.jsonl"),
    (
        PROBLEMS + "--sample_file={files}/cut.jsonl",
        USAGE,
        "line 1 is not a sample (KeyError('task_id'))",
        "the texts task_id",
    ),
    (PROBLEMS + "--sample_file={files}/null.jsonl", USAGE, "line 2 is not a sample (not text)", "the texts task_id"),
    (
        PROBLEMS + "--sample_file={files}/hello.txt",
        USAGE,
        "line 1 is not a sample (JSONDecodeError",
        "the texts task_id",
    ),
    (
        PROBLEMS + "--sample_file={files}/one.jsonl",
        USAGE,
        "no sample for 1 of the 2 problems (Mine/1)",
        "--allow_missing",
    ),
    (
        PROBLEMS + "--sample_file={files}/unknown.jsonl",
        USAGE,
        "'Mine/7'",
        "not one of the 2 problems",
        "did you mean Mine/",
    ),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=2", USAGE, "--k=2 exceeds 1", "pass --k=1"),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=1,5", USAGE, "--k=5 exceeds 1", "pass --k=1"),
    (
        PROBLEMS + "--sample_file={files}/uneven.jsonl --k=0",
        USAGE,
        "--k=0 must be positive integers",
        "--k=1,10",
    ),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=a", USAGE, "--k=a must be positive integers", "--k=1,10"),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --timeout=-1", USAGE, "--timeout=-1.0 must be greater than 0"),
    ("--data_path={files}/no --sample_file={files}/one.jsonl", USAGE, "--data_path=", "/no does not exist"),
    (
        "--data_path={files}/json.jsonl --sample_file={files}/one.jsonl",
        USAGE,
        "no column task_id",
        "its columns are prompt",
    ),
    ("--sample_file={files}/one.jsonl", FAILURE, "openai/openai_humaneval cannot be loaded", "--data_path="),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Broken data and models."""
    folder = tmp_path_factory.mktemp("files")
    problems = "".join(json.dumps({"question": f"{i}+0?", "answer": f"#### {i}"}) + "\n" for i in range(50))
    rows = '{"prompt": "a", "response": "b"}\n'
    columns = ("task_id", "prompt", "entry_point", "test")
    humaneval = [json.dumps(dict.fromkeys(columns, "") | {"task_id": f"Mine/{i}"}) + "\n" for i in range(2)]
    sample = [json.dumps({"task_id": f"Mine/{i}", "completion": ""}) + "\n" for i in range(8)]
    texts = {
        "problems.jsonl": "".join(humaneval),
        "twice.jsonl": humaneval[0] * 2,
        "one.jsonl": sample[0],
        "uneven.jsonl": sample[0] + sample[1] + sample[0],
        "unknown.jsonl": sample[0] + sample[1] + sample[7],
        "null.jsonl": sample[0] + '{"task_id": "Mine/1", "completion": null}\n',
        "gsm8k.jsonl": problems,
        "json.jsonl": rows,
        "hello.txt": "hello",
        "word.jsonl": '{"prompt": "a", "response": "<think> b"}\n' * 56,
        "word-gsm8k.jsonl": '{"question": "<think>", "answer": "#### 2"}\n',
        "model.gguf": "GGUF",
        "empty.jsonl": "",
        "header.csv": "prompt,response\n",
        "cut.jsonl": rows + rows[:15],
        "untrained/test.jsonl": rows,
        "twice/train.jsonl": rows,
        "twice/train.csv": "prompt,response\na,b\n",
        "empty/notes": "",
        "labels.tsv": "x\t1\t\tgood\nx\t7\t\tbad\n",
        "words.tsv": "x\t1\t\tgood\nx\t0\t\tbad\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "random.jsonl").write_bytes(random.Random(0).randbytes(4000))
    packed = gzip.compress(problems.encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for name, size in (("cut-header", 50), ("cut-weights", -1000)):
        shutil.copytree(models.BUNDLED / "tiny", folder / name)
        weights = folder / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])
    shutil.copytree(models.BUNDLED / "tiny", folder / "no-weights", ignore=lambda *_: ["model.safetensors"])
    special = {"grown": {"additional_special_tokens": ["<think>"]}, "grown-padding": {"pad_token": "[PAD]"}}
    for name, added in special.items():
        shutil.copytree(models.BUNDLED / "tiny", folder / name)
        tokenizer = models.load_tokenizer("bundled/tiny")
        tokenizer.add_special_tokens(added)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def program(tmp_path, monkeypatch, capfd, files):
    """Run run_exp.py: exit code, the lines of stderr, and what was left in the results folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # datasets logs to the stderr of an earlier test, now closed

    def run(line: str, *defaults: str) -> tuple[int, list[str], list[Path]]:
        results = tmp_path / "results"
        arguments = [argument.replace("{files}", str(files)) for argument in line.split(" ")]
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = [argument for argument in defaults if argument.partition("=")[0] not in given]
        own = ["wandb.mode=disabled"] + ([] if "results_dir" in given else [f"results_dir={results}"])
        monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments, *own, *defaults])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "run_exp.py"), run_name="__main__")
        said = capfd.readouterr().err.splitlines()
        return stop.value.code, said, sorted(tmp_path.rglob("*"))

    return run


@pytest.fixture
def no_weights(monkeypatch):
    def load_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)
    cpu = models.device("cpu")
    monkeypatch.setattr("lora_one.models.requirements.device", lambda wanted=None: cpu)


def is_one_line(said: list[str], fragments: tuple[str, ...], *, alone: bool) -> None:
    """The error is the last line, its fragments in this order; alone: nothing else was said."""
    print(said[-1])
    pattern = "error: .*" + ".*".join(map(re.escape, fragments))
    assert re.match(pattern, said[-1]), (said[-1], fragments)
    assert not any(text.startswith(("error:", "Traceback")) for text in said[:-1]), "one message, no traceback"
    if alone:
        assert len(said) == 1, said


@pytest.mark.parametrize(("line", "fragments"), [(row[0], row[1:]) for row in CONFIGURATION], ids=lambda x: str(x)[:40])
def test_wrong_configuration(line, fragments, program, no_weights):
    code, said, left = program(line)
    is_one_line(said, fragments, alone=True)
    assert code == USAGE
    assert [path for path in left if path.name != "results"] == [], "no run folder for what was never run"


def small() -> list[str]:
    """Defaults of a small experiment, for what is found on the way."""
    sizes = ["dataset.train_size=48", "dataset.validation_size=8", "dataset.accuracy_examples=0"]
    return [*sizes, "model.epochs=0"]


@pytest.mark.parametrize(
    ("line", "expected", "fragments"), [(*row[:2], row[2:]) for row in READING], ids=lambda x: str(x)[:40]
)
def test_wrong_data_names_and_shapes(line, expected, fragments, program, no_weights):
    code, said, left = program(line, *small())
    is_one_line(said, fragments, alone=False)
    assert code == expected
    assert not any(path.name == "run.json" for path in left)


def test_weights_that_do_not_load(program):
    code, said, left = program("model.name={files}/cut-weights", *small())
    is_one_line(said, ("/cut-weights cannot be loaded", "pass a local folder"), alone=False)
    assert code == FAILURE and not any(path.name == "run.json" for path in left)


def test_overwrite_keeps_the_finished_run_until_the_new_one_can_begin(tmp_path, program, files, monkeypatch):
    """The data cannot be read this time, so the finished run is kept."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(files / "gsm8k.jsonl", rows)
    line = f"dataset=gsm8k model=tiny dataset.path={rows} model.epochs=0 model.real_batch_size=32"
    assert program(line)[0] == 0
    (record,) = (tmp_path / "results").rglob("run.json")
    before = record.read_bytes()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: (_ for _ in ()).throw(RunError("no memory")))
    assert program(line + " overwrite=true")[0] == FAILURE
    assert record.read_bytes() == before and (record.parent / "adapter").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_results_that_cannot_be_written(place, tmp_path, program, no_weights):
    """Below a regular file, which not even root can write to."""
    (tmp_path / "file").write_text("precious")
    code, said, _ = program(f"results_dir={tmp_path / place}")
    is_one_line(said, (str(tmp_path / place), "cannot be written", "set results_dir=<a writable folder>"), alone=True)
    assert code == FAILURE and (tmp_path / "file").read_text() == "precious"


def test_a_run_folder_held_by_another_process(tmp_path, program, no_weights):
    run = small_run(tmp_path / "results")
    identity = config_hash(run.published(), local_fingerprints(run.to_dict(), models.local_folder(run.model.name)))
    folder = folder_of(run, identity)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = f"model.name={run.model.name} dataset.train_size=48 dataset.validation_size=8 model.real_batch_size=8"
        code, said, _ = program(f"{line} model.per_device_batch_size=8")
    is_one_line(said, ("another process is running in", str(folder), "wait until it ends"), alone=True)
    assert code == FAILURE and not (folder / "run.json").exists()


def test_one_wrong_job_of_a_sweep_does_not_stop_the_next(program, no_weights):
    code, said, _ = program("-m seed=-1,-2")
    assert code == USAGE and [text.split(" ")[1] for text in said] == ["seed=-1", "seed=-2"]


def test_the_traceback_is_shown_on_demand(program, no_weights, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, said, _ = program("seed=-1")
    assert code == USAGE and said[0].startswith("Traceback") and said[-1].startswith("error: seed=-1 ")


@pytest.mark.parametrize(
    ("script", "line", "expected", "fragments"),
    [
        (script, *row[:2], row[2:])
        for script, rows in (("gsm8k", EVALUATION), ("humaneval", HUMANEVAL), ("samples", SAMPLES))
        for row in rows
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_evaluation(script, line, expected, fragments, files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = line.format(files=files, results=tmp_path / "eval").split()
    code = score_samples(arguments) if script == "samples" else evaluate(script, arguments)
    is_one_line(capfd.readouterr().err.splitlines(), fragments, alone=False)
    assert code == expected and list(tmp_path.rglob("*")) == []


def test_an_evaluation_never_overwrites_the_results_of_another(files, tmp_path, capfd, no_weights):
    report = {"model": "another", "settings": {}, "provenance": {"fingerprints": {}}}
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    (tmp_path / "predictions.jsonl").write_text("precious")
    options = ["--model_name=bundled/tiny", f"--data_path={files / 'gsm8k.jsonl'}", f"--output_dir={tmp_path}"]
    assert evaluate("gsm8k", options) == USAGE
    is_one_line(capfd.readouterr().err.splitlines(), ("another model or other settings", "--overwrite"), alone=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    assert (tmp_path / "predictions.jsonl").read_text() == "precious"
