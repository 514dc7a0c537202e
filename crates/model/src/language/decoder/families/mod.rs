//! From a family's `config.json` to the parts that its decoder is made of.

mod gemma;
mod gpt2;
mod llama;
mod opt;
mod windows;

use serde_json::Value;

use super::config::DecoderConfig;
use super::keys::{Keys, unsupported};
use super::rope_parameters::with_older_keys;
use crate::activation::Activation;
use crate::config::ConfigError;

/// Every `model_type` of [`read`].
pub(super) const KNOWN: &str = "opt, gpt2, llama, mistral, qwen2, qwen3, smollm3, phi3, gemma, gemma2, gemma3_text";

/// The configuration by `model_type`; `None` where it is unknown.
pub(super) fn read(model_type: &str, json: &Value) -> Option<Result<DecoderConfig, ConfigError>> {
    let family = match model_type {
        "opt" => opt::opt,
        "gpt2" => gpt2::gpt2,
        "llama" => llama::llama,
        "mistral" => llama::mistral,
        "qwen2" => llama::qwen2,
        "qwen3" => llama::qwen3,
        "smollm3" => llama::smollm3,
        "phi3" => llama::phi3,
        "gemma" => gemma::gemma,
        "gemma2" => gemma::gemma2,
        "gemma3_text" => gemma::gemma3,
        _ => return None,
    };
    Some(with_older_keys(json).and_then(|json| {
        let keys = Keys::new(&json);
        refuse_quantized(&keys)?;
        family(&keys)
    }))
}

fn refuse_quantized(keys: &Keys) -> Result<(), ConfigError> {
    match keys.value("quantization_config") {
        None => Ok(()),
        Some(config) => {
            let method = config.get("quant_method").unwrap_or(config);
            Err(unsupported("quantization_config", method, "null: weights in fp32, bf16 or fp16"))
        }
    }
}

/// An activation by the name that `transformers` has for it.
fn activation(keys: &Keys, key: &'static str, default: &'static str) -> Result<Activation, ConfigError> {
    match keys.text(key, default)? {
        "relu" => Ok(Activation::Relu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "silu" | "swish" => Ok(Activation::Silu),
        other => Err(unsupported(key, other, "relu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, silu")),
    }
}

/// The width of each of `heads` heads that share `width`.
fn head_size(keys: &Keys, key: &'static str, width: i64, heads: i64) -> Result<i64, ConfigError> {
    match keys.optional_size("head_dim")? {
        Some(size) => Ok(size),
        None if width % heads == 0 => Ok(width / heads),
        None => Err(unsupported(key, format!("{heads} for width {width}"), "a divisor of the width")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::config::Positions;
    use super::*;

    fn error(json: Value) -> String {
        DecoderConfig::from_json(&json).unwrap().unwrap_err().to_string()
    }

    #[test]
    fn every_known_family_reads_its_own_defaults() {
        for model_type in KNOWN.split(", ") {
            let config = read(model_type, &json!({ "model_type": model_type }));
            let config = config.unwrap_or_else(|| panic!("{model_type} is listed but not read")).unwrap();
            assert!(config.layers.len() > 10, "{model_type}");
        }
        // Phi-3's class has an original length where the file names none.
        let longrope = |more: Value| {
            let factors = vec![1.0; 48];
            let mut json = json!({
                "model_type": "phi3", "max_position_embeddings": 131_072,
                "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": factors},
            });
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let Positions::Rotary(tables) = read("phi3", &json).unwrap().unwrap().positions else {
                panic!("no rotary")
            };
            tables[0].scaling.clone()
        };
        assert_eq!(longrope(json!({})), longrope(json!({"original_max_position_embeddings": 4096})));
        assert_ne!(longrope(json!({})), longrope(json!({"original_max_position_embeddings": 8192})));
        assert!(read("mamba", &json!({})).is_none());
    }

    #[test]
    fn rates_of_dropout_are_those_of_each_family_s_own_keys() {
        let rates = |json: Value| {
            let dropout = DecoderConfig::from_json(&json).unwrap().unwrap().dropout;
            [dropout.embedding, dropout.attention, dropout.residual]
        };
        assert_eq!(rates(json!({"model_type": "opt"})), [0.0, 0.0, 0.1]);
        assert_eq!(rates(json!({"model_type": "opt", "dropout": 0.2, "attention_dropout": 0.3})), [0.0, 0.3, 0.2]);
        assert_eq!(rates(json!({"model_type": "gpt2", "resid_pdrop": 0.3, "attn_pdrop": 0.2})), [0.1, 0.2, 0.3]);
        // Phi-3's class reads embd_pdrop and never uses it.
        let phi3 = json!({"model_type": "phi3", "resid_pdrop": 0.3, "attention_dropout": 0.2, "embd_pdrop": 0.5});
        assert_eq!(rates(phi3), [0.0, 0.2, 0.3]);
        assert_eq!(rates(json!({"model_type": "llama"})), [0.0; 3]);
        assert_eq!(rates(json!({"model_type": "gemma2", "attention_dropout": 0.2})), [0.0, 0.2, 0.0]);
    }

    #[test]
    fn windows_lie_in_the_layers_that_transformers_gives_them_to() {
        let windows = |json: Value| {
            let layers = DecoderConfig::from_json(&json).unwrap().unwrap().layers;
            layers.iter().map(|layer| layer.window.unwrap_or(0)).collect::<Vec<_>>()
        };
        assert_eq!(windows(json!({"model_type": "mistral", "num_hidden_layers": 2})), [4096, 4096]);
        assert_eq!(windows(json!({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": null})), [0, 0]);
        let qwen = json!({"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 9, "max_window_layers": 1});
        assert_eq!(windows(qwen.clone()), [0, 0, 0], "off by default");
        let mut on = qwen;
        on["use_sliding_window"] = json!(true);
        assert_eq!(windows(on), [0, 9, 9]);
        assert_eq!(windows(json!({"model_type": "gemma2", "num_hidden_layers": 3})), [4096, 0, 4096]);
        let gemma3 = json!({"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 8});
        assert_eq!(windows(gemma3), [8, 8, 8, 8, 8, 0, 8]);
        let listed = ["full_attention", "sliding_attention"];
        let listed =
            json!({"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 8, "layer_types": listed});
        assert_eq!(windows(listed), [0, 8]);
    }

    #[test]
    fn values_that_nothing_computes_are_refused_by_their_key() {
        let cases = [
            (json!({"model_type": "llama", "hidden_act": "mish"}), "text_config.hidden_act: got mish"),
            (json!({"model_type": "llama", "num_key_value_heads": 5}), "text_config.num_key_value_heads: got 5"),
            (json!({"model_type": "llama", "num_attention_heads": 7}), "num_attention_heads: got 7 for width 4096"),
            (json!({"model_type": "llama", "head_dim": 7}), "text_config.head_dim: got 7"),
            (
                json!({"model_type": "llama", "hidden_size": -1}),
                "text_config.hidden_size: got -1, supported: 1 to 2^24",
            ),
            (json!({"model_type": "llama", "hidden_size": "big"}), "hidden_size: expected a count, got \"big\""),
            (json!({"model_type": "llama", "eos_token_id": 32000}), "text_config.eos_token_id: got 32000"),
            (
                json!({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2}}),
                "rope_scaling: got",
            ),
            (
                json!({"model_type": "llama", "partial_rotary_factor": 0.5}),
                "text_config.partial_rotary_factor: got 0.5",
            ),
            (json!({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}), "got \"awq\""),
            (json!({"model_type": "mistral", "attention_bias": true}), "text_config.attention_bias: got true"),
            (
                json!({"model_type": "qwen3", "layer_types": ["full_attention"]}),
                "text_config.layer_types: got 1 entries",
            ),
            (
                json!({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
                "text_config.sliding_window: got null",
            ),
            (
                json!({"model_type": "gemma2", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]}),
                "text_config.layer_types: got \"chunked_attention\"",
            ),
            (
                json!({"model_type": "gemma3_text", "use_bidirectional_attention": true}),
                "text_config.use_bidirectional_attention: got true, supported: false",
            ),
            (
                json!({"model_type": "gemma", "use_bidirectional_attention": true}),
                "use_bidirectional_attention: got true",
            ),
            (
                json!({"model_type": "gemma2", "use_bidirectional_attention": true}),
                "use_bidirectional_attention: got true",
            ),
            (
                json!({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2}}),
                "text_config.rope_parameters: got {",
            ),
            (json!({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}), "attn_logit_softcapping: got 50.0"),
            (json!({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling: got"),
            (json!({"model_type": "smollm3", "no_rope_layers": [1]}), "text_config.no_rope_layers: got 1 entries"),
            (json!({"model_type": "gpt2", "add_cross_attention": true}), "text_config.add_cross_attention: got true"),
            (json!({"model_type": "gpt2", "n_head": 7}), "text_config.n_head: got 7 for width 768"),
            (json!({"model_type": "opt", "layerdrop": 0.1}), "text_config.layerdrop: got 0.1"),
            (json!({"model_type": "opt", "dropout": 1.5}), "dropout: expected a probability below 1, got 1.5"),
        ];
        for (config, expected) in cases {
            let message = error(config.clone());
            assert!(message.contains(expected), "{config}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
