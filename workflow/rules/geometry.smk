# needs: networks, paths, feature network.   makes: shapes of trajectories, their convergence, likelihoods.   next: results.smk


rule geometry:
    """Shapes of a network's trajectories over a path, and of closed-form denoisers' beside them."""
    input:
        images=files.IMAGES,
        network=network_of("geometry", "geometry", "network"),
        path=path_of("geometry", "geometry"),
    output:
        files.GEOMETRY,
    log:
        "results/{dataset}/logs/geometry/{geometry}.log",
    benchmark:
        "results/{dataset}/benchmarks/geometry/{geometry}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("geometry")
    resources:
        **asks("geometry"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        settings=settings_of("geometry", "geometry"),
    shell:
        "exec python -m anisodiff geometry --dataset {params.dataset:q} --settings {params.settings:q}"
        " --images {input.images:q} --network {input.network:q} --path {input.path:q} --output {output:q}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule geometry_table:
    """A row for each denoiser over each path."""
    input:
        lambda wildcards: FILES[wildcards.dataset].geometry.values(),
    output:
        csv=files.GEOMETRY_TABLE,
        md=files.GEOMETRY_PAGE,
    log:
        "results/{dataset}/logs/geometry_table.log",
    conda:
        ENVIRONMENT
    params:
        files=lambda wildcards: json.dumps(FILES[wildcards.dataset].geometry),
        folder=subpath(output.csv, parent=True),
    shell:
        "exec python -m anisodiff geometry-table --files {params.files:q} --output {params.folder:q} >{log:q} 2>&1"


rule likelihood:
    """Nats of held-out images under a network over a path, a range of them a job."""
    input:
        images=files.IMAGES,
        network=network_of("likelihoods", "likelihood", "network"),
        path=path_of("likelihoods", "likelihood"),
    output:
        files.LIKELIHOOD,
    log:
        "results/{dataset}/logs/likelihood/{likelihood}/{first}-{last}.log",
    benchmark:
        "results/{dataset}/benchmarks/likelihood/{likelihood}/{first}-{last}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("likelihood")
    resources:
        **asks("likelihood"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        # more images are more shards; those that are there stay
        settings=settings_of("likelihoods", "likelihood", without=["images", "shard"]),
    shell:
        "exec python -m anisodiff likelihood --dataset {params.dataset:q} --settings {params.settings:q}"
        " --first {wildcards.first} --last {wildcards.last} --images {input.images:q} --network {input.network:q}"
        " --path {input.path:q} --output {output:q} --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule convergence:
    """Distance of a method's states and denoised estimates at every node of its grid."""
    input:
        unpack(lambda wildcards: sample_inputs(wildcards, [wildcards.nfe])),
        features=features_file,
        reference=files.REFERENCE,
    output:
        files.CONVERGENCE,
    log:
        "results/{dataset}/logs/convergence/{method}-nfe{nfe}.log",
    benchmark:
        "results/{dataset}/benchmarks/convergence/{method}-nfe{nfe}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("convergence")
    resources:
        **asks("convergence"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        method=METHOD_JSON,
        grids=lambda wildcards, input: option("grid", input.grids),
        images=setting("sampling.images"),
        batch=setting("sampling.batch"),
        kind=setting("features.kind"),
    shell:
        "exec python -m anisodiff convergence --dataset {params.dataset:q} --method {params.method:q}"
        " --nfe {wildcards.nfe} --images {params.images} --batch {params.batch}"
        " --network {input.network:q} --path {input.path:q} {params.grids:q}"
        " --features {input.features:q} --features-kind {params.kind:q} --reference {input.reference:q}"
        " --output {output:q} --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"
