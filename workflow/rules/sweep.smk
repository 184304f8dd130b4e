# Rules of a sweep (`--config sweep=FILE`), in addition to those of a study.


# Studies with the same params of a phase, and of the phases before it, share its outputs: one of them runs the phase, the
# others have hard links. No artifact is modified in place.
for phase in STUDY.links():

    rule:
        name:
            f"share_{phase}"
        input:
            STUDY.donor_manifests(phase),
        output:
            STUDY.linked_manifests(phase),
        wildcard_constraints:
            study=STUDY.linking(phase),
        localrule: True
        params:
            donor=STUDY.donor_folder(phase),
            folder=STUDY.linked_folder(phase),
        shell:
            "rm -rf {params.folder} && mkdir -p {params.folder} && "
            "(cp -al {params.donor}/. {params.folder} 2> /dev/null || cp -a {params.donor}/. {params.folder})"


ruleorder: share_data > data
ruleorder: share_backbone > backbone
ruleorder: share_latents > latents > latents_train
ruleorder: share_train > train_gs
ruleorder: share_baselines > baselines
ruleorder: share_sample > sample


# Selects the operating point and the threshold of a training on val.
rule choose:
    input:
        "results/{study}-val/scores/manifest.json",
    output:
        "work/{study}/chosen.json",
    log:
        STUDY.log("choose"),
    localrule: True
    params:
        **STUDY.sweep_params(of_member=True),
    shell:
        "exec genseg sweep {params.sweep} --params {params.file} --choose {wildcards.study} > {log} 2>&1"


rule sweep:
    input:
        STUDY.scores(),
    output:
        f"{STUDY.sweep.folder}/manifest.json",
        [
            report(
                f"{STUDY.sweep.folder}/{STUDY.sweep.name}.{suffix}", caption="../report/sweep.rst", category="Sweep"
            )
            for suffix in ("csv", "tex", "md")
        ],
    log:
        f"{STUDY.values.work_dir}/logs/sweep.{STUDY.sweep.name}.log",
    benchmark:
        f"{STUDY.values.work_dir}/benchmarks/sweep.{STUDY.sweep.name}.tsv"
    conda:
        "../envs/genseg.yaml"
    threads: STUDY.threads("tables")
    resources:
        **STUDY.resources("tables"),
    params:
        **STUDY.sweep_params(),
    shell:
        "exec genseg lease --log {log} --gpus {resources.gpu} -- "
        "genseg sweep {params.sweep} --params {params.file} --tables"
