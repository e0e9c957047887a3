"""How the page looks: gradio's stock theme with the system's fonts, a sheet of styles, and a little script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

_ASSETS = Path(__file__).parent / "assets"
_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """The stock theme; nothing of it is fetched from elsewhere, and its colours have contrast enough."""
    return gr.themes.Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONO
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_700",
        button_cancel_background_fill="#b91c1c", button_cancel_background_fill_hover="#991b1b",
        link_text_color="*primary_700", link_text_color_dark="*primary_300",
        link_text_color_visited="*primary_700", link_text_color_visited_dark="*primary_300",
        link_text_color_hover="*primary_800", link_text_color_hover_dark="*primary_200",
        block_title_text_weight="600",
    )  # fmt: skip


def look() -> dict[str, Any]:
    """What ``gr.mount_gradio_app`` is given."""
    script, screens, css = ((_ASSETS / n).read_text(encoding="utf-8") for n in ("page.js", "screens.css", "page.css"))
    return {
        "theme": theme(),
        "css": css,
        "head": f'<meta name="color-scheme" content="light dark"><style>{screens}</style><script>{script}</script>',
    }
