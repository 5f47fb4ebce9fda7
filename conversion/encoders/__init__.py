"""The encoders of Gemma 3n, MobileNet-V5 for pictures and a conformer for sound, as graphs.

config     config.json -> what the manifest says about each modality; without torch
towers     torch modules of tower and projector whose large weights stay in the checkpoint
linears    large matrices and norms as placeholder nodes, so that no weight passes through torch
patches    what the exporter cannot trace, replaced while it runs
export     the modules -> graphs with placeholders, by optimum's exporter
placement  placeholders -> MatMulNBits or MatMul, with weights streamed to the weight file
write      all of it for one bundle
"""
