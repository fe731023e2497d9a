# needs: urls and hashes of the configuration.   makes: fetched files, images, reference statistics.
# next: training.smk


rule download:
    """A published or committed file, refused if its hash differs."""
    output:
        "results/fetched/{file}",
    log:
        "results/fetched/logs/{file}.log",
    wildcard_constraints:
        file="(?!logs/).+",
    conda:
        ENVIRONMENT
    params:
        options=download_options,
    shell:
        "exec python -m anisodiff download {params.options} --output {output:q} >{log:q} 2>&1"


rule convert:
    """One of EDM's pickled networks as safetensors; nothing in it is run."""
    input:
        lambda wildcards: fetched(DATASETS[wildcards.dataset]["base"]["url"]),
    output:
        "results/{dataset}/base.safetensors",
    log:
        "results/{dataset}/logs/convert.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("convert"),
    shell:
        "exec python -m anisodiff convert {input:q} {output:q} >{log} 2>&1"


rule images:
    """The training images, in a folder that training maps into memory."""
    input:
        images_source,
    output:
        directory("results/{dataset}/images"),
    log:
        "results/{dataset}/logs/images.log",
    benchmark:
        "results/{dataset}/benchmarks/images.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("images")
    resources:
        **asks("images"),
    params:
        settings=images_settings,
    shell:
        "exec python -m anisodiff images {params.settings} --output {output:q} --workers {threads} >{log} 2>&1"


rule reference:
    """Feature statistics that distances are measured to: published ones, or those of the images."""
    input:
        images="results/{dataset}/images",
        features=features_file,
        published=reference_statistics,
    output:
        "results/{dataset}/reference.safetensors",
    log:
        "results/{dataset}/logs/reference.log",
    benchmark:
        "results/{dataset}/benchmarks/reference.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("reference")
    resources:
        **asks("reference"),
    params:
        compute=compute_json(),
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
        published=lambda wildcards, input: f"--published {input.published}" if input.published else "",
    shell:
        "exec python -m anisodiff reference --images {input.images:q} --features {input.features:q}"
        " --features-kind {params.kind} {params.published} --output {output:q} --compute {params.compute:q} --threads {threads}"
        " >{log} 2>&1"
