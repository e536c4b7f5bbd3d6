"""The student in numbers of few bits: rounded as it is, or trained while it is rounded."""

from stillhouse.quantize.activations import round_inputs
from stillhouse.quantize.grid import Grid, choose_scales, from_codes, on_grid, to_codes
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.quantize.quantize import (
    FLOAT8_WIDTH,
    TRAINING,
    QuantizeResult,
    draw_windows,
    grid_of,
    planned_bytes,
    qat_section,
    quantize,
    train_quantized,
)
from stillhouse.quantize.sensitivity import Sensitivity, choose_kept, measure
from stillhouse.quantize.units import Unit, find_units, model_bytes, told_left_over

__all__ = [
    "FILE",
    "FLOAT8_WIDTH",
    "TRAINING",
    "Grid",
    "Quantization",
    "QuantizeResult",
    "Sensitivity",
    "Unit",
    "choose_kept",
    "choose_scales",
    "draw_windows",
    "find_units",
    "from_codes",
    "grid_of",
    "measure",
    "model_bytes",
    "on_grid",
    "planned_bytes",
    "qat_section",
    "quantize",
    "round_inputs",
    "to_codes",
    "told_left_over",
    "train_quantized",
]
