//! Stage 1 (BLIP-2, section 3.2): the Q-Former with its contrastive, matching and generation heads, behind image features.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use crate::config::Blip2Config;
use crate::dropout::Dropout;
use crate::layers::{LayerNorm, Linear};
use crate::qformer::{ImageKeys, QFormer, TextBatch, TextEmbeddings, TextHead};

/// The start of the learned temperature.
const INITIAL_TEMPERATURE: f64 = 0.07;

/// Everything that stage 1 trains.
#[derive(Debug)]
pub struct Stage1 {
    /// The trunk with its queries and text half.
    pub qformer: QFormer,
    /// LAVIS' `ln_vision`.
    pub ln_vision: LayerNorm,
    vision_projection: Linear,
    text_projection: Linear,
    itm_head: Linear,
    head: TextHead,
    /// The temperature of ITC, 0-d.
    pub temp: Tensor,
    decoder_start: i64,
}

/// What the packed pass gives the losses.
#[derive(Debug)]
pub struct Stage1Pass {
    /// Keys of the batch's images, for the pairs of ITM.
    pub keys: ImageKeys,
    /// L2-normalised embeddings of every query, f32 `[B, queries, E]`.
    pub image_embeds: Tensor,
    /// L2-normalised embeddings of the texts, f32 `[B, E]`.
    pub text_embeds: Tensor,
    /// Hidden states of the generation text, `[B, T, hidden]`.
    pub generation: Tensor,
    /// The texts' embeddings before the shared LayerNorm, `[B, T, hidden]`.
    text: Tensor,
}

/// What takes the other's place in the pairs of ITM that do not match: an image and a text for each sample.
#[derive(Debug)]
pub struct PairNegatives {
    images: ImageKeys,
    /// `[B, T, hidden]`, before the shared LayerNorm.
    embeddings: Tensor,
    text: TextBatch,
}

impl Stage1 {
    /// Declares all trainable parameters below `root`.
    pub fn new(root: &Scope, config: &Blip2Config) -> Stage1 {
        let (hidden, embed) = (config.qformer.hidden_size, config.top.image_text_hidden_size);
        let post_layernorm = root.pp("vision_model.post_layernorm");
        Stage1 {
            qformer: QFormer::new(root, &config.qformer, config.top.num_query_tokens, true),
            ln_vision: LayerNorm::new(&post_layernorm, config.vision.hidden_size(), config.vision.layer_norm_eps()),
            vision_projection: Linear::default_init(&root.pp("vision_projection"), hidden, embed),
            text_projection: Linear::default_init(&root.pp("text_projection"), hidden, embed),
            itm_head: Linear::default_init(&root.pp("itm_head"), hidden, 2),
            head: TextHead::new(root, &config.qformer),
            temp: root.param("temp", &[], Init::Const(INITIAL_TEMPERATURE)),
            decoder_start: config.decoder_start_token(),
        }
    }

    /// The packed pass: image, uni-modal text and generation text at once.
    ///
    /// # Shapes
    /// `features [B, N, width]`.
    pub fn forward(&self, features: &Tensor, text: &TextBatch, dropout: &Dropout) -> Stage1Pass {
        let keys = self.image_keys(features);
        let (cls, dec) = self.embeddings().forward_with_start(&text.ids, self.decoder_start);
        let packed = self.qformer.encode_packed(&keys, &cls, &dec, text, dropout);
        Stage1Pass {
            keys,
            image_embeds: unit(&self.vision_projection.forward(&packed.queries)),
            text_embeds: unit(&self.text_projection.forward(&packed.cls)),
            generation: packed.dec,
            text: cls,
        }
    }

    /// Negatives that are samples of the batch itself.
    ///
    /// # Shapes
    /// `image, text_of i64 [B]`: whose image and whose text takes the place of row i's.
    pub fn negatives_within(
        &self,
        pass: &Stage1Pass,
        text: &TextBatch,
        image: &Tensor,
        text_of: &Tensor,
    ) -> PairNegatives {
        PairNegatives {
            images: pass.keys.select(image),
            embeddings: pass.text.index_select(0, text_of),
            text: text.select(text_of),
        }
    }

    /// Negatives that came from elsewhere: an image's features and a text for each row.
    ///
    /// # Shapes
    /// `features [B, N, width]`; `text` as wide as the batch's own.
    pub fn negatives_from(&self, features: &Tensor, text: TextBatch) -> PairNegatives {
        PairNegatives { images: self.image_keys(features), embeddings: self.embeddings().forward(&text.ids), text }
    }

    /// Matching logits of the positive pairs and of those with a negative image and a negative text, f32 `[3B, 2]` in that order.
    pub fn match_pairs(
        &self,
        pass: &Stage1Pass,
        text: &TextBatch,
        negatives: &PairNegatives,
        dropout: &Dropout,
    ) -> Tensor {
        let batch = text.batch();
        // (positive, negative text, negative image): the first two kinds share their images.
        let pairs = pass.keys.matching_pairs(&negatives.images);
        let embeddings = Tensor::cat(&[&pass.text, &negatives.embeddings, &pass.text], 0);
        let texts = TextBatch::cat(&[text, &negatives.text, text]);
        let queries = self.qformer.encode_pairs(&pairs, &embeddings, &texts, &dropout.for_pairs());
        let kinds = self.match_logits(&queries).split(batch, 0);
        Tensor::cat(&[&kinds[0], &kinds[2], &kinds[1]], 0)
    }

    /// Matching logits of one image with each of several texts, f32 `[P, 2]` (evaluation). The image's keys are read once for all of them.
    ///
    /// # Shapes
    /// `keys` of a single image; `text [P, T]`.
    pub fn match_texts(&self, keys: &ImageKeys, text: &TextBatch) -> Tensor {
        let embeddings = self.embeddings().forward(&text.ids);
        let pairs = keys.repeated(text.batch());
        self.match_logits(&self.qformer.encode_pairs(&pairs, &embeddings, text, &Dropout::off()))
    }

    /// Keys of images, for [`match_texts`](Self::match_texts).
    ///
    /// # Shapes
    /// `features [B, N, width]`.
    pub fn image_keys(&self, features: &Tensor) -> ImageKeys {
        self.qformer.image_keys(features, &self.ln_vision)
    }

    /// Generation logits of chosen rows: `hidden [M, hidden] -> [M, vocabulary]`.
    pub fn generation_logits(&self, hidden: &Tensor) -> Tensor {
        self.head.forward(hidden, self.embeddings())
    }

    /// L2-normalised embeddings of images, f32 `[B, queries, E]` (evaluation).
    pub fn embed_images(&self, features: &Tensor) -> Tensor {
        let keys = self.image_keys(features);
        unit(&self.vision_projection.forward(&self.qformer.encode_images(&keys, &Dropout::off())))
    }

    /// L2-normalised embeddings of texts, f32 `[B, E]` (evaluation).
    pub fn embed_texts(&self, text: &TextBatch) -> Tensor {
        let cls = self.qformer.encode_texts(&self.embeddings().forward(&text.ids), text, &Dropout::off());
        unit(&self.text_projection.forward(&cls))
    }

    /// The mean over the queries of their logits (LAVIS).
    fn match_logits(&self, queries: &Tensor) -> Tensor {
        self.itm_head.forward(queries).to_kind(Kind::Float).mean_dim([1i64].as_slice(), false, Kind::Float)
    }

    fn embeddings(&self) -> &TextEmbeddings {
        self.qformer.text.as_ref().expect("stage 1 builds the Q-Former with its text half")
    }
}

/// L2 normalisation over the last axis, in f32.
fn unit(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Float);
    let norm = x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true).clamp_min(1e-12);
    x / norm
}
