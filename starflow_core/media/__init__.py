"""Pictures and clips: reading, fitting to a size, writing frame by frame, metadata in the file.

Pixels are float32 in [-1, 1], a picture (3, H, W), a clip (F, 3, H, W). A path says what its file is: see
`VideoWriter`. Files are read and written with imageio; the modules say where they go past it, and why.
"""

from .pictures import read_image
from .pixels import FITS, Clip, fit
from .reading import read_metadata, read_video, video_frames
from .targets import PICTURES, STILLS, Sound
from .videos import has_encoder
from .writing import VideoWriter, check_writable, write_video

__all__ = [
    "FITS",
    "PICTURES",
    "STILLS",
    "Clip",
    "Sound",
    "VideoWriter",
    "check_writable",
    "fit",
    "has_encoder",
    "read_image",
    "read_metadata",
    "read_video",
    "video_frames",
    "write_video",
]
