# One job writes many cells: model and libraries are loaded once a job. It skips the cells that an earlier run finished,
# here or in the predictions.
rule sample_shard:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/latents/manifest.json",
        STUDY.models(),
    output:
        STUDY.shard("{size}", "{shard}"),
    log:
        f"{WORK}/logs/sample.size={{size}}.shard={{shard}}.log",
    benchmark:
        f"{WORK}/benchmarks/sample.size={{size}}.shard={{shard}}.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("sample")
    resources:
        **STUDY.resources("sample"),
    params:
        uses=STUDY.uses_at_size,
        code=STUDY.code("sample"),
        shards=STUDY.params.sample.shards,
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg sample --params {params.file} "
        "--size {wildcards.size} --shard {wildcards.shard} --shards {params.shards}"


# Gathers the shards into the predictions and removes the cells that the grid no longer holds.
rule sample:
    input:
        STUDY.shards(),
    output:
        f"{RESULTS}/predictions/manifest.json",
    log:
        f"{WORK}/logs/sample.log",
    benchmark:
        f"{WORK}/benchmarks/sample.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: 1
    resources:
        **STUDY.resources("sample") | {"gpu": 0},
    params:
        uses=STUDY.uses("sample"),
        code=STUDY.code("sample"),
        file=STUDY.params_file,
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- genseg sample --params {params.file} --gather"
