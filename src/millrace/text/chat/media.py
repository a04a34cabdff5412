"""What is said of a part of a message that is no text: that text alone is read, and what reads it.

Knows the names of such parts in the APIs of OpenAI and Anthropic, and no API itself.
"""

from __future__ import annotations

_IMAGES, _SOUNDS, _VIDEOS, _FILES = "images", "audio", "video", "files"
_MEDIA = {
    "image": _IMAGES,
    "image_url": _IMAGES,
    "input_image": _IMAGES,
    "image_pil": _IMAGES,
    "image_embeds": _IMAGES,
    "computer_screenshot": _IMAGES,
    "input_audio": _SOUNDS,
    "audio_url": _SOUNDS,
    "audio": _SOUNDS,
    "video_url": _VIDEOS,
    "video": _VIDEOS,
    "file": _FILES,
    "input_file": _FILES,
    "document": _FILES,  # of text they are read, which is known before this is asked
}


def not_text(kind: object) -> str:
    """Why a part of this type is refused, as the end of a sentence."""
    media = _MEDIA.get(kind) if isinstance(kind, str) else None
    if media is None:
        return "this server reads text only"
    other = "`millrace serve MODEL --engine vllm` reads what the checkpoint's own encoders can"
    return f"this server reads text only, and no {media}; {other}"
