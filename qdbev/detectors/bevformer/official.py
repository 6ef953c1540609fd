"""Names of the tensors of published BEVFormer checkpoints. Source: fundamentalvision/BEVFormer at 66b65f3 on mmdet3d 0.17.1."""

from qdbev.nn.state_dict import OfficialKeys

_HEAD = "pts_bbox_head."
_TRANSFORMER = _HEAD + "transformer."

KEYS = OfficialKeys(
    names=(
        ("img_backbone.*conv2.conv_offset.", "backbone.*conv2.offset."),
        ("img_backbone.", "backbone."),
        ("img_neck.lateral_convs.#.conv.", "neck.lateral.#."),
        ("img_neck.fpn_convs.#.conv.", "neck.output.#."),
        (_HEAD + "positional_encoding.row_embed.", "encoder.row_embed."),
        (_HEAD + "positional_encoding.col_embed.", "encoder.col_embed."),
        (_HEAD + "bev_embedding.", "encoder.bev_embedding."),
        (_HEAD + "query_embedding.", "decoder.query_embedding."),
        (_HEAD + "cls_branches.", "head.cls_branches."),
        (_HEAD + "reg_branches.", "head.reg_branches."),
        (_TRANSFORMER + "level_embeds", "encoder.level_embed"),
        (_TRANSFORMER + "cams_embeds", "encoder.camera_embed"),
        (_TRANSFORMER + "can_bus_mlp.norm.", "encoder.can_bus_norm."),
        (_TRANSFORMER + "can_bus_mlp.", "encoder.can_bus_mlp."),
        (_TRANSFORMER + "reference_points.", "decoder.reference_points."),
        (_TRANSFORMER + "encoder.layers.#.attentions.0.", "encoder.layers.#.temporal."),
        (_TRANSFORMER + "encoder.layers.#.attentions.1.", "encoder.layers.#.spatial."),
        (_TRANSFORMER + "decoder.layers.#.attentions.0.attn.", "decoder.layers.#.self_attention."),
        (_TRANSFORMER + "decoder.layers.#.attentions.1.", "decoder.layers.#.cross_attention."),
        *(
            (f"{_TRANSFORMER}{part}.layers.#.{official}.", f"{part}.layers.#.{ours}.")
            for part in ("encoder", "decoder")
            for official, ours in (("ffns.0.layers.0.0", "ffn.linear1"), ("ffns.0.layers.1", "ffn.linear2"), ("norms", "norms"))
        ),
    ),
    ignored=(_HEAD + "code_weights",),
)
"""BEVFormer's table. `code_weights` are the loss weights of the ten numbers of a box code."""
