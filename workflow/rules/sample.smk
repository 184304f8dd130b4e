# One job samples many runs, so that the model and the libraries are loaded once. Finished runs are reused.
rule sample_shard:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/latents/manifest.json",
        STUDY.models(),
    output:
        STUDY.sample_marker("{size}", "{shard}"),
    log:
        STUDY.log("sample.size={size}.shard={shard}"),
    benchmark:
        STUDY.benchmark("sample.size={size}.shard={shard}")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("sample")
    resources:
        **STUDY.resources("sample"),
    params:
        **STUDY.params("sample", at_size=True),
        shards=STUDY.values.resources.sample.shards,
    shell:
        STUDY.command("sample --size {wildcards.size} --shard {wildcards.shard} --shards {params.shards}")


# Gathers the shards into the predictions and removes the runs that the study no longer has.
rule sample:
    input:
        STUDY.sample_markers(),
    output:
        f"{RESULTS}/predictions/manifest.json",
    log:
        STUDY.log("sample"),
    benchmark:
        STUDY.benchmark("sample")
    conda:
        "../envs/genseg.yaml"
    threads: 1
    resources:
        **STUDY.resources("sample", gpu=False),
    params:
        **STUDY.params("sample"),
    shell:
        STUDY.command("sample --gather")
