//! What `transformers` 4.57 cannot do with an export.

use blip2_model::Blip2Config;
use blip2_model::language::LanguageConfig;
use serde_json::Value;

/// The only image encoder that its BLIP-2 has.
pub(crate) const BLIP2_VIT: &str = "blip_2_vision_model";

/// The token whose places the queries take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageToken {
    /// Its id, where the vocabulary has one for it.
    pub index: Option<i64>,
    /// Whether it also fills batches.
    pub pads: bool,
    /// Whether the processor of `transformers` knows it.
    pub named: bool,
}

/// The image encoder's `model_type` in a model's `config.json`.
pub(crate) fn image_encoder_type(json: &Value) -> &str {
    json["vision_config"]["model_type"].as_str().unwrap_or(BLIP2_VIT)
}

/// A line for each thing that does not work; `image_token` is stage 2's.
pub(crate) fn remarks(model: &Blip2Config, json: &Value, image_token: Option<&ImageToken>) -> Vec<String> {
    if let Some(reason) = without_class(model, json) {
        return vec![format!("transformers has no class for it: {reason}")];
    }
    let nameless = match image_token {
        Some(ImageToken { index: Some(id), named: false, .. }) => Some(format!(
            "Blip2Processor does not put in the queries' places, as no token of the vocabulary can be called <image>: put token {id} (image_token_index) \
             before each prompt's ids, {} times, or its pictures are not looked at",
            model.top.num_query_tokens
        )),
        _ => None,
    };
    let about_image_token = match image_token {
        Some(ImageToken { index: None, .. }) => {
            Some("transformers cannot generate with it: its vocabulary has no id left for the queries".into())
        }
        Some(ImageToken { index: Some(id), pads: true, .. }) => Some(format!(
            "the queries take the places of token {id} (image_token_index), with which its tokenizer fills batches; batches of several lengths need \
             another pad token in transformers"
        )),
        _ => None,
    };
    let left_out = left_out_by_sdpa(&json["text_config"]).map(|part| {
        format!(
            "load it with attn_implementation=\"eager\": the attention that transformers takes by default leaves out {part}"
        )
    });
    about_image_token.into_iter().chain(nameless).chain(left_out).collect()
}

/// What `scaled_dot_product_attention` has no argument for, and `transformers` no warning.
fn left_out_by_sdpa(text: &Value) -> Option<&'static str> {
    match text["model_type"].as_str()? {
        // Its class has a cap where the file says nothing.
        "gemma2" if text.get("attn_logit_softcapping").is_none_or(|cap| !cap.is_null()) => {
            Some("attn_logit_softcapping")
        }
        "gpt2" if text["scale_attn_by_inverse_layer_idx"] == true => Some("scale_attn_by_inverse_layer_idx"),
        "gpt2" if text["scale_attn_weights"] == false => Some("scale_attn_weights"),
        _ => None,
    }
}

/// Why it has no class for a model of these parts, where that is so.
fn without_class(model: &Blip2Config, json: &Value) -> Option<String> {
    match &model.language {
        _ if image_encoder_type(json) != BLIP2_VIT => {
            Some(format!("its BLIP-2 has no {} as image encoder", image_encoder_type(json)))
        }
        Some(LanguageConfig::T5(t5)) if t5.scales_output() != t5.tie_word_embeddings => {
            Some("its T5 scales the output before a tied head, and before no other".into())
        }
        Some(LanguageConfig::Decoder(decoder)) if decoder.embedding_width != decoder.width => Some(format!(
            "its BLIP-2 projects the queries to hidden_size, {}, and this model's embeddings are {} wide",
            decoder.width, decoder.embedding_width
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(vision: &str, text: Value, image_token: ImageToken) -> Vec<String> {
        let json = json!({
            "architectures": ["Blip2ForConditionalGeneration"], "num_query_tokens": 32, "qformer_config": {},
            "vision_config": {"model_type": vision}, "text_config": text,
        });
        remarks(&Blip2Config::from_json(&json).unwrap(), &json, Some(&image_token))
    }

    const TOKEN: ImageToken = ImageToken { index: Some(7), pads: false, named: true };

    #[test]
    fn other_image_encoders_and_some_language_models_have_no_class() {
        let reason = |vision: &str, text: Value| {
            let lines = said(vision, text, TOKEN);
            assert!(lines.len() < 2, "{lines:?}");
            lines.first().map(|line| line.strip_prefix("transformers has no class for it: ").unwrap().to_string())
        };
        let t5 = |tied: bool, scaled: bool| json!({"model_type": "t5", "decoder_start_token_id": 0, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled});
        assert_eq!(reason(BLIP2_VIT, json!({"model_type": "llama"})), None);
        assert_eq!(reason(BLIP2_VIT, json!({"model_type": "opt"})), None);
        assert_eq!(reason(BLIP2_VIT, t5(true, true)), None);
        assert_eq!(reason(BLIP2_VIT, t5(false, false)), None);
        let clip = reason("clip_vision_model", json!({"model_type": "opt"})).unwrap();
        assert_eq!(clip, "its BLIP-2 has no clip_vision_model as image encoder");
        assert!(reason(BLIP2_VIT, t5(true, false)).unwrap().starts_with("its T5 "));
        // OPT-350M.
        let narrow = json!({"model_type": "opt", "hidden_size": 1024, "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": false});
        let expected = "its BLIP-2 projects the queries to hidden_size, 1024, and this model's embeddings are 512 wide";
        assert_eq!(reason(BLIP2_VIT, narrow).unwrap(), expected);
    }

    #[test]
    fn attention_that_the_default_kernel_does_not_compute_is_told() {
        let gpt2 = |key: &str, value: bool| json!({"model_type": "gpt2", key: value});
        for (text, part) in [
            (json!({"model_type": "gemma2"}), Some("attn_logit_softcapping")),
            (json!({"model_type": "gemma2", "attn_logit_softcapping": 50.0}), Some("attn_logit_softcapping")),
            (json!({"model_type": "gemma2", "attn_logit_softcapping": null}), None),
            (gpt2("scale_attn_by_inverse_layer_idx", true), Some("scale_attn_by_inverse_layer_idx")),
            (gpt2("scale_attn_weights", false), Some("scale_attn_weights")),
            (gpt2("scale_attn_weights", true), None),
            (json!({"model_type": "gemma3_text"}), None),
        ] {
            let lines = said(BLIP2_VIT, text.clone(), TOKEN);
            assert_eq!(lines.len(), usize::from(part.is_some()), "{text}: {lines:?}");
            assert!(
                lines.iter().all(|line| line.starts_with("load it with attn_implementation=\"eager\"")),
                "{lines:?}"
            );
            assert!(part.is_none_or(|part| lines[0].ends_with(part)), "{lines:?}");
        }
    }

    #[test]
    fn queries_need_an_id_that_nothing_else_uses() {
        let llama = json!({"model_type": "llama"});
        assert!(said(BLIP2_VIT, llama.clone(), TOKEN).is_empty());
        let none = said(BLIP2_VIT, llama.clone(), ImageToken { index: None, pads: false, named: false });
        assert!(none.len() == 1 && none[0].ends_with("its vocabulary has no id left for the queries"), "{none:?}");
        let pads = said(BLIP2_VIT, llama, ImageToken { index: Some(0), pads: true, named: true });
        assert!(pads.len() == 1 && pads[0].contains("token 0 (image_token_index), with which"), "{pads:?}");
    }
}
