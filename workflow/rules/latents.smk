# The latents that training reads have their own rule, so that another image size for sampling causes no new training.
rule latents_train:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
    output:
        f"{RESULTS}/latents/train.json",
    log:
        STUDY.log("latents_train"),
    benchmark:
        STUDY.benchmark("latents_train")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("latents")
    resources:
        **STUDY.resources("latents"),
    params:
        **STUDY.params("latents", only=["latents", "train.size"]),
    shell:
        STUDY.command("latents --only-training")


# All image sizes. Finished shards are reused.
rule latents:
    input:
        f"{DATA}/manifest.json",
        f"{RESULTS}/backbone/manifest.json",
        f"{RESULTS}/latents/train.json",
    output:
        f"{RESULTS}/latents/manifest.json",
    log:
        STUDY.log("latents"),
    benchmark:
        STUDY.benchmark("latents")
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("latents")
    resources:
        **STUDY.resources("latents"),
    params:
        **STUDY.params("latents"),
    shell:
        STUDY.command("latents")
