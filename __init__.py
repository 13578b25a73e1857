"""STARFlow and STARFlow-V for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What the host asks a pack for."""
    from .nodes import STARFlowExtension

    return STARFlowExtension()
