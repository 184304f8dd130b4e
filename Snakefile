# Entry point of the DAG: params, targets, and one file of rules per phase. `dvc.yaml` has one stage per phase and is generated
# (`genseg dvc --write`). `--configfile params/X.yaml` runs another study, `--config sweep=sweeps/X.yaml` a sweep of the study.
from genseg.dag.rules import open_study

# `--configfile` replaces params.yaml. If they were merged, keys of an edited params.yaml would change the other study.
if not workflow.overwrite_configfiles:

    configfile: "params.yaml"


STUDY = open_study(config, workflow.overwrite_configfiles or ["params.yaml"])
DATA, RESULTS, WORK = STUDY.data, STUDY.results, STUDY.work


report: "workflow/report/workflow.rst"


wildcard_constraints:
    size=r"\d{4}",
    shard=r"\d+",


# All manifests are targets. With only the manifest of the tables, a missing earlier output would not be noticed.
rule all:
    default_target: True
    input:
        STUDY.manifests(),


include: "workflow/rules/preflight.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/backbone.smk"
include: "workflow/rules/latents.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/baselines.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/refine.smk"
include: "workflow/rules/score.smk"


if "sweep" in config:

    # All paths of the rules above have the wildcard `study`: the study itself, and one for each training of each variant.
    wildcard_constraints:
        study=STUDY.names(),

    include: "workflow/rules/sweep.smk"

else:

    include: "workflow/rules/tables.smk"
