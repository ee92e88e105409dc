"""Wrong configurations: one line on stderr that names the value, the rule and the way out, before anything is loaded.

Everything goes through the real entry, run_exp.py as a program in this process.
"""

import pytest

from tests.helpers.bad_input import USAGE, is_one_line

HEAD = "model=tiny model.type=SequenceClassification dataset=cola "
CHAT = "dataset=chat model=tiny dataset.path={files}/gsm8k.jsonl "

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
    ("model=/models/mine", "model=/models/mine: the value of a group", "model.name=/models/mine"),
    ("dataset=data/my.jsonl", "dataset=data/my.jsonl: the value of a group", "dataset.path=data/my.jsonl"),
    ("peft=qlora", "peft=qlora is not a choice of conf/peft", "set model.quantization=nf4"),
    ("wandb=off", "wandb=off is not a choice of conf/wandb", "set wandb.mode=disabled"),
    ("init=lora,pissa", "init=lora,pissa has several values", "add -m"),
    ("wandb.name=a(b", "wandb.name=a(b cannot be parsed", "in quotes inside those of the shell"),
    ("--dry_run", "--dry_run is not a flag", "dry_run=<value>", "--help"),
    ("--model.learning-rate=1", "--model.learning-rate=1 is not a flag", "model.learning_rate=1"),
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
    ("init.cache=true", "init.cache=True must be a folder", "null to cache nothing"),
    # what a dry run plans for
    ("plan.processes=4", "plan.processes=4 is read only by a dry run", "add dry_run=true, or remove plan.processes"),
    ("plan.hardware=h100", "plan.hardware=h100 is read only by a dry run", "remove plan.hardware"),
    ("dry_run=true plan.processes=0", "plan.processes=0 is out of range", "at least 1"),
    ("dry_run=true plan.processes=many", "plan.processes='many' has the wrong type", "must be int or null"),
    ("dry_run=true hardware=h10", "plan.hardware=h10 is neither a file nor a profile", "did you mean h100?"),
    ("dry_run=true plan.processes=5", "model.real_batch_size=32 is not divisible by 5 processes", "or start 4"),
    ("plan.gpus=4", "unknown key plan.gpus", "valid: hardware, processes"),
    ("plan=64", "plan=64 must have keys", "set plan.<key>=<value>"),
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


@pytest.mark.parametrize(("line", "fragments"), [(row[0], row[1:]) for row in CONFIGURATION], ids=lambda x: str(x)[:40])
def test_wrong_configuration(line, fragments, program, no_weights):
    code, said, left = program(line)
    is_one_line(said, fragments, alone=True)
    assert code == USAGE
    assert [path for path in left if path.name != "results"] == [], "no run folder for what was never run"


def test_one_wrong_job_of_a_sweep_does_not_stop_the_next(program, no_weights):
    code, said, _ = program("-m seed=-1,-2")
    assert code == USAGE and [text.split(": ")[1:3] for text in said] == [
        [f"job {number} (seed -{number})", f"seed=-{number} is out of range"] for number in (1, 2)
    ]


def test_the_traceback_is_shown_on_demand(program, no_weights, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, said, _ = program("seed=-1")
    assert code == USAGE and said[0].startswith("Traceback") and said[-1].startswith("error: seed=-1 ")
