# The trained control, on the training phrases: it waits for no other phase.
rule refine_train:
    input:
        f"{DATA}/manifest.json",
    output:
        f"{RESULTS}/refined/network.json",
    log:
        f"{WORK}/logs/refine_train.log",
    benchmark:
        f"{WORK}/benchmarks/refine_train.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("refine")
    resources:
        **STUDY.resources("refine") | {"gpu": 0},
    params:
        uses=STUDY.uses("refine", only=["seed", "refine.trained", "refine.controls"]),
        code=STUDY.code("refine"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg refine --params {params.file} --train"


# Every n-th baseline by all of its refiners; what is there already is kept.
rule refine_shard:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        f"{RESULTS}/predictions/manifest.json",
        f"{RESULTS}/baselines/manifest.json",
        f"{RESULTS}/refined/network.json",
    output:
        STUDY.refined_shard("{shard}"),
    log:
        f"{WORK}/logs/refine.shard={{shard}}.log",
    benchmark:
        f"{WORK}/benchmarks/refine.shard={{shard}}.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("refine")
    resources:
        **STUDY.resources("refine"),
    params:
        uses=STUDY.uses("refine"),
        code=STUDY.code("refine"),
        shards=STUDY.params.refine.shards,
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg refine --params {params.file} "
        "--shard {wildcards.shard} --shards {params.shards}"


# Removes what no baseline and refiner account for.
rule refine:
    input:
        STUDY.refined_shards(),
    output:
        f"{RESULTS}/refined/manifest.json",
    log:
        f"{WORK}/logs/refine.log",
    benchmark:
        f"{WORK}/benchmarks/refine.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: 1
    resources:
        **STUDY.resources("refine") | {"gpu": 0},
    params:
        uses=STUDY.uses("refine"),
        code=STUDY.code("refine"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg refine --params {params.file} --gather"
