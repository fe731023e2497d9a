# needs: urls and hashes of the configuration.   makes: fetched files, images, reference statistics.
# next: training.smk


rule fetch:
    """A published or committed file, refused if its hash differs."""
    output:
        "results/{dataset}/fetched/{file}",
    log:
        "results/{dataset}/logs/fetch/{file}.log",
    conda:
        ENVIRONMENT
    params:
        known=known_file,
    shell:
        "exec python -m anisodiff fetch --url {params.known[url]:q} --sha256 {params.known[sha256]} --output {output:q}"
        " >{log} 2>&1"


rule images:
    """The training images, in a folder that training maps into memory."""
    input:
        images_source,
    output:
        directory("results/{dataset}/images"),
    log:
        "results/{dataset}/logs/images.log",
    conda:
        ENVIRONMENT
    threads: CONFIG["threads"]
    params:
        settings=images_settings,
    shell:
        "exec python -m anisodiff images {params.settings} --output {output:q} --workers {threads} >{log} 2>&1"


rule reference:
    """Feature statistics of the data."""
    input:
        images="results/{dataset}/images",
        features=lambda wildcards: fetched(wildcards.dataset, "features"),
    output:
        "results/{dataset}/reference.safetensors",
    log:
        "results/{dataset}/logs/reference.log",
    conda:
        ENVIRONMENT
    threads: CONFIG["threads"]
    params:
        compute=compute_json(),
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    shell:
        "exec python -m anisodiff reference --images {input.images:q} --features {input.features:q}"
        " --features-kind {params.kind} --output {output:q} --compute {params.compute:q} --threads {threads}"
        " >{log} 2>&1"
