"""The recording loop in docs/signal-store.md with a tiny teacher: record, resume, read."""

from __future__ import annotations

from pathlib import Path

import torch

from stillhouse.data.shift import supervised_positions, supervised_rows
from stillhouse.signals import DenseSignal
from stillhouse.signals.encodings import TopK
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import Settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import find_segments
from stillhouse.signals.store import open_store
from stillhouse.signals.writer import StoreWriter
from stillhouse.teachers.backbone import hidden_states, lm_head, trim_head
from tests import tiny
from tests.signals import toys


def test_a_resumed_store_matches_the_live_teacher(tmp_path: Path) -> None:
    teacher = tiny.llama()
    vocabulary = teacher.config.vocab_size
    data = toys.batch(windows=4, vocabulary=vocabulary)
    settings = Settings(TopK(8), vocabulary, {"teacher": "tiny"})
    recorder = Recorder(settings)
    asked = []
    for last in (2, 4):  # the second time, half of the segments are already recorded
        with StoreWriter(tmp_path, settings) as writer:
            windows = (data.input_ids_RL[:last], data.labels_RL[:last], data.position_ids_RL[:last])
            ids_RL, labels_RL, positions_RL = windows
            segments = find_segments(ids_RL, labels_RL, positions_RL)
            missing_S = writer.missing(segments)
            chosen_RL = torch.zeros_like(labels_RL, dtype=torch.bool)
            chosen_RL[:, :-1] = labels_RL[:, 1:] != -100
            chosen_RL[chosen_RL.clone()] = torch.from_numpy(segments.chosen_rows(missing_S))
            with torch.no_grad():
                hidden_RLD = hidden_states(teacher, ids_RL, positions_RL)
            head = trim_head(lm_head(teacher), vocabulary)
            answer = DenseSignal(hidden_RLD[chosen_RL], head)
            wanted = segments.only(missing_S)
            writer.add(wanted, *recorder.encode(wanted, answer))
            asked.append(len(wanted))
            writer.finish()
    assert asked == [4, 4]

    signal = open_store(tmp_path, {"teacher": "tiny"}).read(data.segments)
    with torch.no_grad():
        hidden_RLD = hidden_states(teacher, data.input_ids_RL, data.position_ids_RL)
        positions_N = supervised_positions(data.labels_RL)
        logits_NV = head_logits(lm_head(teacher), supervised_rows(hidden_RLD, positions_N))
    wanted_NK = logits_NV.log_softmax(1).gather(1, signal.ids_NK.long())
    torch.testing.assert_close(signal.log_probs_NK, wanted_NK, atol=5e-3, rtol=1e-3)
    top = logits_NV.log_softmax(1).topk(8).values
    torch.testing.assert_close(wanted_NK, top, atol=1e-3, rtol=0)
