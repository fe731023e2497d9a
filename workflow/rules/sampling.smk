# needs: networks, paths, warps, feature network.   makes: feature statistics of seed ranges, trajectories.
# next: results.smk
#
# A sampling job makes every budget of one method and seed range: single cells are seconds long at small scale. Its
# cells are files beside the manifest, so that a new budget, or a job that died, makes only the cells that are missing.


METHOD_JSON = settings_of("methods", "method", without=["nfe"])


rule sample:
    """Feature statistics of one seed range of a method, at every budget."""
    input:
        unpack(lambda wildcards: sample_inputs(wildcards, budgets_at(wildcards))),
        features=features_file,
        lost=lost_cells,
    output:
        files.MANIFEST,
    log:
        "results/{dataset}/logs/sample/{method}/{first}-{last}.log",
    benchmark:
        "results/{dataset}/benchmarks/sample/{method}/{first}-{last}.tsv"
    conda:
        ENVIRONMENT
    threads: cpus("sample")
    resources:
        **asks("sample"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        method=METHOD_JSON,
        nfe=lambda wildcards: option("nfe", budgets_at(wildcards)),
        grids=lambda wildcards, input: option("grid", input.grids),
        batch=setting("sampling.batch"),
        keep=setting("sampling.keep"),
        kind=setting("features.kind"),
    shell:
        "exec python -m anisodiff sample --dataset {params.dataset:q} --method {params.method:q} {params.nfe:q}"
        " --first {wildcards.first} --last {wildcards.last} --batch {params.batch}"
        " --network {input.network:q} --path {input.path:q} {params.grids:q}"
        " --features {input.features:q} --features-kind {params.kind:q} --output {output:q} --keep {params.keep}"
        " --compute {params.compute:q} --threads {threads} >{log:q} 2>&1"


rule trajectory:
    """States and denoised estimates of a few images along a method's grid."""
    input:
        unpack(lambda wildcards: sample_inputs(wildcards, [wildcards.nfe])),
    output:
        files.TRAJECTORY,
    log:
        "results/{dataset}/logs/trajectory/{method}-nfe{nfe}.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("trajectory"),
    params:
        compute=compute_json(),
        dataset=dataset_json,
        method=METHOD_JSON,
        grids=lambda wildcards, input: option("grid", input.grids),
    shell:
        "exec python -m anisodiff trajectory --dataset {params.dataset:q} --method {params.method:q}"
        " --nfe {wildcards.nfe} --images 8 --network {input.network:q} --path {input.path:q} {params.grids:q}"
        " --output {output:q} --compute {params.compute:q} >{log:q} 2>&1"
