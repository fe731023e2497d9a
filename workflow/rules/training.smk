# needs: images, fetched base networks.   makes: networks, paths, warps, searched levels.   next: sampling.smk


rule pretrain:
    """A base network from nothing, by the recipe that made the committed one."""
    input:
        images=files.IMAGES,
    output:
        files.PRETRAINED,
    log:
        "results/{dataset}/logs/pretrain.log",
    benchmark:
        "results/{dataset}/benchmarks/pretrain.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("pretrain")
    resources:
        **asks("pretrain"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=lambda wildcards: DATASETS[wildcards.dataset].pretrain.as_json(),
    shell:
        "exec python -m anisodiff pretrain --dataset {params.dataset:q} --settings {params.settings:q} --images {input.images:q}"
        " --output {output:q} --compute {params.compute:q} --threads {threads}"
        " --processes {resources.processes} --machines {resources.machines} >{log:q} 2>&1"


rule train_features:
    """The digits classifier, by the recipe that made the committed one."""
    input:
        images=files.IMAGES,
    output:
        files.TRAINED_FEATURES,
    log:
        "results/{dataset}/logs/train_features.log",
    conda:
        ENVIRONMENT
    threads: cpus("train_features")
    resources:
        **asks("train_features"),
    params:
        settings="{}",
    shell:
        "exec python -m anisodiff train-features --settings {params.settings:q} --images {input.images:q}"
        " --output {output:q} --threads {threads} >{log:q} 2>&1"


rule basis:
    """Principal subspaces of the training images."""
    input:
        images=files.IMAGES,
    output:
        files.BASIS,
    log:
        "results/{dataset}/logs/basis/{basis}.log",
    conda:
        ENVIRONMENT
    threads: cpus("basis")
    resources:
        **asks("basis"),
    params:
        dataset=dataset_json,
        settings=settings_of("bases", "basis"),
    shell:
        "exec python -m anisodiff basis --dataset {params.dataset:q} --settings {params.settings:q}"
        " --images {input.images:q} --output {output:q} --threads {threads} >{log:q} 2>&1"


rule path:
    """A path that needs no training."""
    input:
        images=files.IMAGES,
        basis=basis_of("paths", "path"),
    output:
        files.PATH,
    log:
        "results/{dataset}/logs/path/{path}.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("path"),
    params:
        dataset=dataset_json,
        settings=settings_of("paths", "path"),
        basis=basis_option,
    shell:
        "exec python -m anisodiff path --dataset {params.dataset:q} --settings {params.settings:q} --images {input.images:q}"
        " --output {output:q} {params.basis:q} >{log:q} 2>&1"


rule finetune:
    """A network finetuned with EDM's loss, or network and path with trajectory-level score matching."""
    input:
        images=files.IMAGES,
        network=network_of("runs", "run", "start"),
        path=path_of("runs", "run"),
        basis=basis_of("runs", "run"),
    output:
        network=files.NETWORK_OF_RUN,
        path=files.PATH_OF_RUN,
    log:
        "results/{dataset}/logs/finetune/{run}.log",
    benchmark:
        "results/{dataset}/benchmarks/finetune/{run}.tsv"
    # longest first: what waits for a run starts as soon as it can
    priority: 10
    conda:
        ENVIRONMENT
    threads: cpus("finetune")
    resources:
        **asks("finetune"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=settings_of("runs", "run", without=["seeds"]),
        basis=basis_option,
    shell:
        "exec python -m anisodiff finetune --dataset {params.dataset:q} --settings {params.settings:q} --images {input.images:q}"
        " --network {input.network:q} --path {input.path:q}"
        " --output-network {output.network:q} --output-path {output.path:q} {params.basis:q}"
        " --compute {params.compute:q} --threads {threads}"
        " --processes {resources.processes} --machines {resources.machines} >{log:q} 2>&1"


rule warp:
    """The time warp of a path."""
    input:
        images=files.IMAGES,
        network=network_of("warps", "warp", "network"),
        path=path_of("warps", "warp"),
    output:
        files.WARP,
    log:
        "results/{dataset}/logs/warp/{warp}.log",
    benchmark:
        "results/{dataset}/benchmarks/warp/{warp}.tsv"
    priority: 10
    conda:
        ENVIRONMENT
    threads: cpus("warp")
    resources:
        **asks("warp"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=warp_settings,
    shell:
        "exec python -m anisodiff warp --dataset {params.dataset:q} --settings {params.settings:q} --images {input.images:q}"
        " --network {input.network:q} --path {input.path:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


use rule warp as warp_per_nfe with:
    output:
        files.WARP_OF_BUDGET,
    log:
        "results/{dataset}/logs/warp/{warp}/nfe{nfe}.log",
    benchmark:
        "results/{dataset}/benchmarks/warp/{warp}/nfe{nfe}.tsv"


rule search:
    """Levels for every budget, along the trajectories of a few warm-up noises."""
    input:
        network=network_of("searches", "search", "network"),
        path=path_of("searches", "search"),
    output:
        files.SEARCH,
    log:
        "results/{dataset}/logs/search/{search}.log",
    benchmark:
        "results/{dataset}/benchmarks/search/{search}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("search")
    resources:
        **asks("search"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=settings_of("searches", "search"),
    shell:
        "exec python -m anisodiff search --dataset {params.dataset:q} --settings {params.settings:q}"
        " --network {input.network:q} --path {input.path:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule pairs:
    """A teacher's images with their noise, which tunings share."""
    input:
        unpack(lambda wildcards: sample_inputs(wildcards, [wildcards.nfe])),
    output:
        files.PAIRS,
    log:
        "results/{dataset}/logs/pairs/{method}-nfe{nfe}/{first}-{last}.log",
    benchmark:
        "results/{dataset}/benchmarks/pairs/{method}-nfe{nfe}/{first}-{last}.tsv"
    priority: 10
    conda:
        ENVIRONMENT
    threads: cpus("pairs")
    resources:
        **asks("pairs"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        method=settings_of("methods", "method", without=["nfe"]),
        grids=lambda wildcards, input: option("grid", input.grids),
        batch=setting("sampling.batch"),
    shell:
        "exec python -m anisodiff pairs --dataset {params.dataset:q} --method {params.method:q} --nfe {wildcards.nfe}"
        " --first {wildcards.first} --last {wildcards.last} --batch {params.batch}"
        " --network {input.network:q} --path {input.path:q} {params.grids:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule tune:
    """Levels, labels and weights of a solver, for every budget of a tuning."""
    input:
        unpack(tuning_inputs),
    output:
        files.TUNING,
    log:
        "results/{dataset}/logs/tune/{tuning}.log",
    benchmark:
        "results/{dataset}/benchmarks/tune/{tuning}.tsv"
    priority: 10
    conda:
        ENVIRONMENT
    threads: cpus("tune")
    resources:
        **asks("tune"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=settings_of("tunings", "tuning", without=["seeds"]),
        method=lambda wildcards: DATASETS[wildcards.dataset]
        .methods[entry(wildcards, "tunings", "tuning").start]
        .as_json(["nfe"]),
        grids=lambda wildcards, input: option("grid", input.grids),
        features=lambda wildcards, input: option("features", input.features),
    shell:
        "exec python -m anisodiff tune --dataset {params.dataset:q} --settings {params.settings:q}"
        " --method {params.method:q} --network {input.network:q} --path {input.path:q} {params.grids:q}"
        " --pairs {input.pairs:q} {params.features:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"
