"""The vision cache's half on a rank: keeps outputs of the encoder in host memory, where its other half says."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from worker_connector.errors import ConfigurationError, MissingOutput, NativeError
from worker_connector.slab import Slab
from worker_connector.vision_cache_plan import Grant, VisionPlan, VisionReport

_PURPOSE = ("the vision cache", "vision_cache_bytes")

_log = logging.getLogger("vllm.warmroute.vision")


class VisionRank:
    """``size`` bytes of host memory for outputs, page-locked where ``device`` is a GPU. Memory that cannot be had turns the
    cache off for all ranks, with one log line here."""

    def __init__(self, size: int, device: torch.device, make_slab: Callable[..., Slab] = Slab) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slab = self._allocate(size, make_slab)
        self._kept: dict[int, torch.Tensor] = {}
        self._copies: dict[int, Any] = {}
        self._granted: dict[str, Grant] = {}
        self._report = VisionReport(without_memory=int(self._slab is None))
        self._has_failed = False

    def begin(self, plan: VisionPlan, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put what the plan loads into vLLM's encoder cache, forget, and await the outputs that are to be kept.

        Raises:
            MissingOutput: an output is not here. vLLM has planned without its encoder by now, and there is no way back.
        """
        for identifier, ticket in plan.loads.items():
            if identifier not in encoder_cache:
                encoder_cache[identifier] = self._load(identifier, ticket)
        if plan.forget_all:
            self._kept.clear()
            self._copies.clear()
        for ticket in plan.forget:
            self._kept.pop(ticket, None)
            self._copies.pop(ticket, None)
        self._refuse_rest()
        self._granted = dict(plan.saves)

    def save(self, encoder_cache: dict[str, torch.Tensor], identifier: str) -> None:
        """Keep an output that the encoder just made, if that is asked for. Its failure is the cache's loss alone."""
        grant = self._granted.pop(identifier, None)
        if grant is None:
            return
        try:
            is_kept = self._save(grant, encoder_cache[identifier])
        except Exception:  # noqa: BLE001 - whatever it is, the request has its output and goes on
            if not self._has_failed:
                self._has_failed = True
                _log.exception(
                    "An output of the vision encoder could not be kept; further ones that cannot are not named"
                )
            is_kept = False
        if not is_kept:
            self._report.refused.add(grant.ticket)

    def take_report(self) -> VisionReport | None:
        """What came to pass since the last call; None where nothing did."""
        self._refuse_rest()
        for ticket, copy in list(self._copies.items()):
            if copy.query():
                del self._copies[ticket]
                self._report.kept[ticket] = 1
        if not self._report:
            return None
        report, self._report = self._report, VisionReport()
        return report

    def close(self) -> None:
        """Wait for copies, and give the memory back."""
        if self._stream is not None:
            self._stream.synchronize()
        self._kept.clear()
        self._copies.clear()
        if self._slab is not None:
            self._slab.close()
            self._slab = None

    def _allocate(self, size: int, make_slab: Callable[..., Slab]) -> Slab | None:
        if not size:
            return None
        try:
            return make_slab(1, size, device=self._device, purpose=_PURPOSE)
        except (ConfigurationError, NativeError, MemoryError) as error:
            _log.error("The vision cache is off: %s", error)
            return None

    def _load(self, identifier: str, ticket: int) -> torch.Tensor:
        kept = self._kept.get(ticket)
        if kept is None:
            raise MissingOutput(f"the encoder's output of {identifier} is not in the vision cache of this rank")
        if self._stream is None:
            return kept.clone()
        return kept.to(self._device, non_blocking=True)

    def _save(self, grant: Grant, output: Any) -> bool:
        if not isinstance(output, torch.Tensor) or self._slab is None or self._slab.bytes is None:
            return False
        nbytes = output.numel() * output.element_size()
        self._report.nbytes[grant.ticket] = nbytes
        if not 0 < nbytes <= grant.nbytes:
            return False
        place = self._slab.bytes[grant.offset : grant.offset + nbytes].view(output.dtype).view(output.shape)
        if self._stream is None:
            place.copy_(output.detach())
            self._report.kept[grant.ticket] = 1
        else:
            self._copies[grant.ticket] = self._start_copy(self._stream, place, output.detach())
        self._kept[grant.ticket] = place
        return True

    def _start_copy(self, stream: torch.cuda.Stream, place: torch.Tensor, output: torch.Tensor) -> Any:
        """The event of a copy's end."""
        # After everything queued so far: the encoder, and loads from the memory that is written now.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            place.copy_(output, non_blocking=True)
            output.record_stream(stream)
            return stream.record_event()

    def _refuse_rest(self) -> None:
        """What the encoder did not make in its step will not come."""
        self._report.refused |= {grant.ticket for grant in self._granted.values()}
        self._granted = {}
