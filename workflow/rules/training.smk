# needs: fetched base networks.   makes: networks, paths and warps.   next: sampling.smk


rule pretrain:
    """A base network from nothing, by the recipe that made the committed one."""
    output:
        RESULTS + "/pretrained/base.safetensors",
    log:
        RESULTS + "/logs/pretrain.log",
    benchmark:
        RESULTS + "/benchmarks/pretrain.tsv"
    params:
        dataset=dataset_json,
        settings=lambda wildcards: as_json(DATASETS[wildcards.dataset]["pretrain"] | {"loss": "edm"}),
    threads: CONFIG["threads"]
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff pretrain --dataset {params.dataset:q} --settings {params.settings:q}"
        " --output {output:q} --device {DEVICE} --threads {threads} >{log} 2>&1"


rule train_features:
    """The digits classifier, by the recipe that made the committed one."""
    output:
        RESULTS + "/pretrained/features.safetensors",
    log:
        RESULTS + "/logs/train_features.log",
    params:
        settings=as_json({"seed": 0, "steps": 800, "batch": 128, "learning_rate": 0.002, "heldout": 160}),
    threads: CONFIG["threads"]
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff train-features --settings {params.settings:q} --output {output:q} --threads {threads}"
        " >{log} 2>&1"


rule path:
    """A path that needs no training."""
    output:
        RESULTS + "/paths/{path}.safetensors",
    log:
        RESULTS + "/logs/path/{path}.log",
    params:
        dataset=dataset_json,
        settings=section("paths", "path"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff path --dataset {params.dataset:q} --settings {params.settings:q} --output {output:q}"
        " >{log} 2>&1"


def run_settings(wildcards):
    """The run's own settings; what it starts from reaches it as files."""
    run = DATASETS[wildcards.dataset]["runs"][wildcards.run]
    return as_json({key: value for key, value in run.items() if key not in ("start", "path")})


rule finetune:
    """A network finetuned with EDM's loss, or network and path with trajectory-level score matching."""
    input:
        network=lambda wildcards: network_file(
            wildcards.dataset, DATASETS[wildcards.dataset]["runs"][wildcards.run]["start"]
        ),
        path=lambda wildcards: path_file(
            wildcards.dataset, DATASETS[wildcards.dataset]["runs"][wildcards.run]["path"]
        ),
    output:
        network=RESULTS + "/runs/{run}/network.safetensors",
        path=RESULTS + "/runs/{run}/path.safetensors",
    log:
        RESULTS + "/logs/finetune/{run}.log",
    benchmark:
        RESULTS + "/benchmarks/finetune/{run}.tsv"
    params:
        dataset=dataset_json,
        settings=run_settings,
    # longest first: what waits for a run starts as soon as it can
    priority: 10
    threads: CONFIG["threads"]
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff finetune --dataset {params.dataset:q} --settings {params.settings:q}"
        " --network {input.network:q} --path {input.path:q}"
        " --output-network {output.network:q} --output-path {output.path:q}"
        " --device {DEVICE} --threads {threads} >{log} 2>&1"


def warp_settings(wildcards):
    """The warp's own settings, with the number of steps of its budget where it is learned per budget."""
    warp = dict(DATASETS[wildcards.dataset]["warps"][wildcards.warp])
    if nfe := getattr(wildcards, "nfe", None):
        warp["steps"] = int(nfe) // 2
    return as_json({key: value for key, value in warp.items() if key not in ("network", "path")})


rule warp:
    """The time warp of a path."""
    input:
        network=lambda wildcards: network_file(
            wildcards.dataset, DATASETS[wildcards.dataset]["warps"][wildcards.warp]["network"]
        ),
        path=lambda wildcards: path_file(
            wildcards.dataset, DATASETS[wildcards.dataset]["warps"][wildcards.warp]["path"]
        ),
    output:
        RESULTS + "/warps/{warp}.safetensors",
    log:
        RESULTS + "/logs/warp/{warp}.log",
    benchmark:
        RESULTS + "/benchmarks/warp/{warp}.tsv"
    params:
        dataset=dataset_json,
        settings=warp_settings,
    priority: 10
    threads: CONFIG["threads"]
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff warp --dataset {params.dataset:q} --settings {params.settings:q}"
        " --network {input.network:q} --path {input.path:q} --output {output:q}"
        " --device {DEVICE} --threads {threads} >{log} 2>&1"


use rule warp as warp_per_nfe with:
    output:
        RESULTS + "/warps/{warp}-nfe{nfe}.safetensors",
    log:
        RESULTS + "/logs/warp/{warp}-nfe{nfe}.log",
    benchmark:
        RESULTS + "/benchmarks/warp/{warp}-nfe{nfe}.tsv"


ruleorder: warp_per_nfe > warp
