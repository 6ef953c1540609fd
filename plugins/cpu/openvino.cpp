// The operators as an extension of OpenVINO, which reads them from ONNX nodes of domain qdbev and from engine files.
//
// The kernels run on OpenVINO's own threads. The contract of each operator is in qdbev/ops/contract.py.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>

#include "kernels.h"

namespace qdbev {

const float* floats(const ov::Tensor& of) { return static_cast<const float*>(of.data()); }

template <typename Work>
void in_parallel(int64_t count, const Work& work) {
    tbb::parallel_for(tbb::blocked_range<int64_t>(0, count), [&](const tbb::blocked_range<int64_t>& range) { work(range.begin(), range.end()); });
}

// CAMERAS: SpatialCrossAttention, else MultiScaleDeformableAttention. INTEGER: int8 `value`, followed by its scale.
template <bool CAMERAS, bool INTEGER>
class AttentionOp : public ov::op::Op {
public:
    static constexpr const char* NAME = CAMERAS ? (INTEGER ? "SpatialCrossAttentionInt8" : "SpatialCrossAttention")
                                                : (INTEGER ? "MultiScaleDeformableAttentionInt8" : "MultiScaleDeformableAttention");
    static const ov::DiscreteTypeInfo& get_type_info_static() {
        static const ov::DiscreteTypeInfo info{NAME, "qdbev"};
        return info;
    }
    const ov::DiscreteTypeInfo& get_type_info() const override { return get_type_info_static(); }

    AttentionOp() = default;
    AttentionOp(const ov::OutputVector& inputs, const ov::frontend::NodeContext& node)
        : ov::op::Op(inputs), level_hw(node.get_attribute<std::vector<int64_t>>("level_hw")) {
        constructor_validate_and_infer_types();
    }
    AttentionOp(const ov::OutputVector& inputs, const std::vector<int64_t>& level_hw) : ov::op::Op(inputs), level_hw(level_hw) {
        constructor_validate_and_infer_types();
    }
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<AttentionOp>(inputs, level_hw);
    }
    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("level_hw", level_hw);
        return true;
    }
    void validate_and_infer_types() override {
        const auto value = get_input_partial_shape(0), offsets = get_input_partial_shape(OFFSETS);
        const auto rank = value.rank().get_length();
        NODE_VALIDATION_CHECK(this, get_input_element_type(0) == (INTEGER ? ov::element::i8 : ov::element::f32), "value has another type");
        set_output_type(0, ov::element::f32, {offsets[0], offsets[1], value[rank - 2] * value[rank - 1]});
    }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto value = inputs[0].get_shape(), offsets = inputs[OFFSETS].get_shape(), references = inputs[REFERENCES].get_shape();
        const size_t rank = value.size();
        Attention in{};
        in.B = value[0], in.N = CAMERAS ? value[1] : 1, in.S = value[rank - 3], in.M = value[rank - 2], in.C = value[rank - 1];
        in.Q = offsets[1], in.L = offsets[3], in.P = offsets[4], in.D = CAMERAS ? references[3] : 1;
        in.level_hw = level_hw.data();
        in.value = inputs[0].data();
        in.value_scale = INTEGER ? floats(inputs[1]) : nullptr;
        in.reference_points = floats(inputs[REFERENCES]);
        in.visible = CAMERAS ? floats(inputs[REFERENCES + 1]) : nullptr;
        in.sampling_offsets = floats(inputs[OFFSETS]);
        in.attention_logits = floats(inputs[OFFSETS + 1]);
        outputs[0].set_shape({offsets[0], offsets[1], value[rank - 2] * value[rank - 1]});
        float* output = static_cast<float*>(outputs[0].data());
        in_parallel(in.B * in.Q, [&](int64_t first, int64_t last) { kernels().attend(in, first, last, output); });
        return true;
    }

private:
    static constexpr int REFERENCES = INTEGER ? 2 : 1, OFFSETS = REFERENCES + 1 + CAMERAS;  // positions of inputs
    std::vector<int64_t> level_hw;
};

class Im2colOp : public ov::op::Op {
public:
    static constexpr const char* NAME = "ModulatedDeformableIm2col";
    static const ov::DiscreteTypeInfo& get_type_info_static() {
        static const ov::DiscreteTypeInfo info{NAME, "qdbev"};
        return info;
    }
    const ov::DiscreteTypeInfo& get_type_info() const override { return get_type_info_static(); }

    Im2colOp() = default;
    Im2colOp(const ov::OutputVector& inputs, const ov::frontend::NodeContext& node) : Im2colOp(inputs, node.get_attribute<int64_t>("stride")) {}
    Im2colOp(const ov::OutputVector& inputs, int64_t stride) : ov::op::Op(inputs), stride(stride) { constructor_validate_and_infer_types(); }
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Im2colOp>(inputs, stride);
    }
    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("stride", stride);
        return true;
    }
    void validate_and_infer_types() override {
        const auto x = get_input_partial_shape(0), offsets = get_input_partial_shape(1);
        set_output_type(0, ov::element::f32, {x[0], x[1] * 9, offsets[2], offsets[3]});
    }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto x = inputs[0].get_shape(), offsets = inputs[1].get_shape();
        Im2col in{};
        in.B = x[0], in.C = x[1], in.H = x[2], in.W = x[3], in.h = offsets[2], in.w = offsets[3], in.stride = stride;
        in.x = floats(inputs[0]), in.offsets = floats(inputs[1]), in.mask = floats(inputs[2]);
        outputs[0].set_shape({x[0], x[1] * 9, offsets[2], offsets[3]});
        float* output = static_cast<float*>(outputs[0].data());
        in_parallel(in.B * 9 * in.h, [&](int64_t first, int64_t last) { kernels().im2col(in, first, last, output); });
        return true;
    }

private:
    int64_t stride = 1;
};

template <typename Op>
void add(std::vector<ov::Extension::Ptr>& to) {
    to.push_back(std::make_shared<ov::OpExtension<Op>>());
    const auto read = [](const ov::frontend::NodeContext& node) -> ov::OutputVector {
        ov::OutputVector inputs;
        for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(int(i)));
        return {std::make_shared<Op>(inputs, node)};
    };
    to.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(Op::NAME, "qdbev", read));
}

std::vector<ov::Extension::Ptr> extensions() {
    std::vector<ov::Extension::Ptr> all;
    add<AttentionOp<false, false>>(all);
    add<AttentionOp<false, true>>(all);
    add<AttentionOp<true, false>>(all);
    add<AttentionOp<true, true>>(all);
    add<Im2colOp>(all);
    return all;
}

}  // namespace qdbev

OPENVINO_CREATE_EXTENSIONS(qdbev::extensions());
