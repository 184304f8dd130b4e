# Trains the network of the trained control on the training phrases. It needs no phase but `data`.
rule refine_train:
    input:
        f"{DATA}/manifest.json",
    output:
        f"{RESULTS}/refined/network.json",
    log:
        STUDY.log("refine_train"),
    benchmark:
        STUDY.benchmark("refine_train")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("refine")
    resources:
        **STUDY.resources("refine", gpu=False),
    params:
        **STUDY.params("refine", only=["seed", "refine.trained", "refine.controls"]),
    shell:
        STUDY.command("refine --train")


# One job refines every n-th baseline with G4Seg and its controls. Finished files are reused.
rule refine_shard:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        STUDY.predictions(),
        f"{RESULTS}/baselines/manifest.json",
        f"{RESULTS}/refined/network.json",
    output:
        STUDY.refine_marker("{shard}"),
    log:
        STUDY.log("refine.shard={shard}"),
    benchmark:
        STUDY.benchmark("refine.shard={shard}")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("refine")
    resources:
        **STUDY.resources("refine"),
    params:
        **STUDY.params("refine"),
        shards=STUDY.values.resources.refine.shards,
    shell:
        STUDY.command("refine --shard {wildcards.shard} --shards {params.shards}")


# Writes the manifest and removes files that belong to no baseline and refiner of the study.
rule refine:
    input:
        STUDY.refine_markers(),
    output:
        f"{RESULTS}/refined/manifest.json",
    log:
        STUDY.log("refine"),
    benchmark:
        STUDY.benchmark("refine")
    conda:
        "../envs/genseg.yaml"
    threads: 1
    resources:
        **STUDY.resources("refine", gpu=False),
    params:
        **STUDY.params("refine"),
    shell:
        STUDY.command("refine --gather")
