"""What `calipers verify` can decide, in the words of the VNN-LIB standard's solver interface.

Nothing heavy is imported, but for the operators, which are read off the reader's own table.
"""

from __future__ import annotations

STATIC: dict[str, tuple[str, ...]] = {
    "onnx_opset_versions": ("7", "21"),
    "onnx_element_types": ("real", "float32", "float64"),
    "vnnlib_versions": ("1.0", "2.1"),
    "hidden_node_theories": ("NH",),
    "multiple_input_output_theories": ("SIO",),
    "multiple_network_theories": ("SNET",),
    "multiple_node_comparison_theories": ("SNC",),
    "arithmetic_complexity_theories": ("BND", "OUTC", "LIN"),
    "optimised_disjunctive_reasoning": ("true",),
    "serialise_assignments": ("true",),
}


def answer(name: str) -> tuple[str, ...]:
    """The lines to print for an option of ``calipers supports``, its dashes as underscores.

    Raises:
        KeyError: no such capability.
    """
    if name == "onnx_operators":
        from calipers.graph.onnx_rules import RULES

        return tuple(sorted(RULES))
    return STATIC[name]
