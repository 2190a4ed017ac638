from vllm.recorded import EngineArgs

__all__ = ["EngineArgs"]
