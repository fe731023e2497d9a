# needs: urls and hashes of the configuration.   makes: fetched files, images, reference statistics.
# next: training.smk


rule download:
    """A published or committed file, refused if its hash differs."""
    output:
        files.FETCHED,
    log:
        "results/fetched/logs/{file}.log",
    wildcard_constraints:
        file="(?!logs/).+",
    conda:
        ENVIRONMENT
    params:
        options=download_options,
        access=download_access,
        state=lambda wildcards: state_of(FETCHED[files.FETCHED.format(file=wildcards.file)]["url"]),
    shell:
        "exec python -m anisodiff download {params.options:q} {params.access:q} --output {output:q} >{log:q} 2>&1"


rule convert:
    """One of EDM's pickled networks as safetensors; nothing in it is run."""
    input:
        lambda wildcards: files.fetched(DATASETS[wildcards.dataset].base.url),
    output:
        files.CONVERTED,
    log:
        "results/{dataset}/logs/convert.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("convert"),
    shell:
        "exec python -m anisodiff convert {input:q} {output:q} >{log:q} 2>&1"


rule images:
    """The training images, in a folder that training maps into memory."""
    input:
        images_source,
    output:
        directory(files.IMAGES),
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
        options=images_options,
        state=lambda wildcards: state_of(images_url(wildcards)),
    shell:
        "exec python -m anisodiff images {params.options:q} --output {output:q} --workers {threads} >{log:q} 2>&1"


rule reference:
    """Feature statistics that distances are measured to: published ones, or those of the images."""
    input:
        images=files.IMAGES,
        features=features_file,
        published=reference_statistics,
    output:
        files.REFERENCE,
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
        kind=setting("features.kind"),
        published=lambda wildcards, input: option("published", input.published),
        keep=features_kept,
    shell:
        "exec python -m anisodiff reference --images {input.images:q} --features {input.features:q}"
        " --features-kind {params.kind:q} {params.published:q} --keep {params.keep} --output {output:q} --compute {params.compute:q} --threads {threads}"
        " >{log:q} 2>&1"
