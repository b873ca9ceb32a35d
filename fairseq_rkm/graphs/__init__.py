"""CUDA graphs: recording, when to record and when to replay, for functions and for decoding; nothing of fairseq."""

from fairseq_rkm.graphs.decoding_graphs import DecodingGraphs
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, copy_all, record, refuse

__all__ = ["DecodingGraphs", "GraphRecorder", "GraphedFunction", "Recordings", "copy_all", "record", "refuse"]
