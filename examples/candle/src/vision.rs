//! The frozen image encoder: BLIP-2's own ViT, or DINOv2. Both are pre-norm ViTs; they differ in names, LayerScale and whether
//! query, key and value are one matrix.

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, layer_norm};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Scores, attend, linear, split_heads};

/// `vision_config`, with `transformers`' default for a key that is left out.
#[derive(Deserialize)]
#[serde(default)]
struct Config {
    hidden_size: usize,
    intermediate_size: Option<usize>,
    mlp_ratio: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    layer_norm_eps: f64,
    use_swiglu_ffn: bool,
    hidden_act: String,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            hidden_size: 1408,
            intermediate_size: None,
            mlp_ratio: 4,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 14,
            layer_norm_eps: 1e-6,
            use_swiglu_ffn: false,
            hidden_act: "gelu".into(),
        }
    }
}

/// Which family's names the tensors bear.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Blip2,
    Dinov2,
}

/// An image encoder with the LayerNorm that BLIP-2 trains behind it.
pub struct VisionTower {
    patches: (Tensor, Tensor),
    class: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    post_layernorm: LayerNorm,
    patch_size: usize,
    /// The side of the pictures that its position embedding was trained for.
    pub image_size: usize,
    /// Channel means and deviations that go with the family.
    pub normalisation: ([f32; 3], [f32; 3]),
}

struct Block {
    norm1: LayerNorm,
    /// One matrix for query, key and value, or three.
    qkv: Vec<Linear>,
    output: Linear,
    /// LayerScale of the attention and of the MLP.
    scales: Option<[Tensor; 2]>,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl VisionTower {
    /// Loads the tower that `config.json` describes; `vb` is at `vision_model`.
    pub fn load(config_json: &Value, vb: VarBuilder) -> Result<VisionTower> {
        let json = &config_json["vision_config"];
        let c: Config = serde_json::from_value(json.clone()).context("config.json: vision_config")?;
        let family = match json["model_type"].as_str().unwrap_or("blip_2_vision_model") {
            "blip_2_vision_model" => Family::Blip2,
            "dinov2" => Family::Dinov2,
            other => bail!(
                "config.json: vision_config.model_type: expected blip_2_vision_model or dinov2, which this example computes, got {other}"
            ),
        };
        if c.use_swiglu_ffn || c.hidden_act != "gelu" {
            bail!("config.json: vision_config: expected hidden_act gelu and no use_swiglu_ffn");
        }
        if c.patch_size == 0 || c.num_attention_heads == 0 || !c.hidden_size.is_multiple_of(c.num_attention_heads) {
            bail!(
                "config.json: vision_config: expected a patch_size above 0 and num_attention_heads that divide hidden_size"
            );
        }
        // The export names hidden_states[layer] as transformers counts them; left out, the tower's last.
        let layers = c.num_hidden_layers as i64;
        let layer = config_json["vision_feature_layer"].as_i64().unwrap_or(layers);
        let depth = if layer < 0 { layers + 1 + layer } else { layer };
        if !(0..=layers).contains(&depth) {
            bail!("config.json: vision_feature_layer: expected a layer of a tower with {layers} blocks, got {layer}");
        }
        let (e, width) = (vb.pp("embeddings"), c.hidden_size);
        let [conv, class, positions, blocks] = match family {
            Family::Blip2 => ["patch_embedding", "class_embedding", "position_embedding", "encoder.layers"],
            Family::Dinov2 => ["patch_embeddings.projection", "cls_token", "position_embeddings", "encoder.layer"],
        };
        let grid = c.image_size / c.patch_size;
        Ok(VisionTower {
            patches: (
                e.pp(conv).get((width, 3, c.patch_size, c.patch_size), "weight")?,
                e.pp(conv).get(width, "bias")?,
            ),
            class: e.get((1, 1, width), class)?,
            positions: e.get((1, grid * grid + 1, width), positions)?,
            blocks: (0..depth).map(|i| Block::load(&c, family, vb.pp(blocks).pp(i))).collect::<Result<_>>()?,
            post_layernorm: layer_norm(width, c.layer_norm_eps, vb.pp("post_layernorm"))?,
            patch_size: c.patch_size,
            image_size: c.image_size,
            normalisation: match family {
                Family::Blip2 => ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.2613026, 0.2757771]),
                Family::Dinov2 => ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            },
        })
    }

    /// Image features as the Q-Former reads them: `[1, 3, S, S] -> [1, 1 + (S / patch)^2, width]`.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        let size = pixels.dim(3)?;
        if !size.is_multiple_of(self.patch_size) {
            bail!(
                "preprocessor_config.json: size: expected a multiple of the patch of {}, got {size}",
                self.patch_size
            );
        }
        let (weight, bias) = &self.patches;
        let patches = pixels.conv2d(weight, 0, self.patch_size, 1, 1)?.flatten_from(2)?.transpose(1, 2)?;
        let x = Tensor::cat(&[&self.class, &patches.broadcast_add(bias)?], 1)?;
        let mut x = x.broadcast_add(&self.positions(size / self.patch_size)?)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        Ok(self.post_layernorm.forward(&x)?)
    }

    /// Position embeddings of a `grid x grid` input: the table, its patches resized bicubically where the sizes differ.
    fn positions(&self, grid: usize) -> Result<Tensor> {
        let side = self.image_size / self.patch_size;
        if side == grid {
            return Ok(self.positions.clone());
        }
        let width = self.positions.dim(2)?;
        let resize = bicubic(side, grid, self.positions.device())?; // [grid, side]
        let table = self.positions.narrow(1, 1, side * side)?;
        let rows = resize.matmul(&table.reshape((side, side * width))?)?; // [grid, side * width]
        let table = rows.reshape((grid, side, width))?.transpose(0, 1)?.contiguous()?; // [side, grid, width]
        let columns = resize.matmul(&table.reshape((side, grid * width))?)?; // [grid, grid * width], columns first
        let table = columns.reshape((grid, grid, width))?.transpose(0, 1)?.reshape((1, grid * grid, width))?;
        Ok(Tensor::cat(&[&self.positions.narrow(1, 0, 1)?, &table], 1)?)
    }
}

impl Block {
    fn load(c: &Config, family: Family, vb: VarBuilder) -> Result<Block> {
        let (width, eps) = (c.hidden_size, c.layer_norm_eps);
        let inner = match family {
            Family::Blip2 => c.intermediate_size.unwrap_or(6144),
            Family::Dinov2 => width * c.mlp_ratio,
        };
        let [norm1, output, norm2] = match family {
            Family::Blip2 => ["layer_norm1", "self_attn.projection", "layer_norm2"],
            Family::Dinov2 => ["norm1", "attention.output.dense", "norm2"],
        };
        let qkv = match family {
            Family::Blip2 => vec![linear(width, 3 * width, vb.pp("self_attn.qkv"))?],
            Family::Dinov2 => {
                let part = |name| linear(width, width, vb.pp("attention.attention").pp(name));
                vec![part("query")?, part("key")?, part("value")?]
            }
        };
        let scale = |name: &str| vb.pp(name).get(width, "lambda1");
        Ok(Block {
            norm1: layer_norm(width, eps, vb.pp(norm1))?,
            qkv,
            output: linear(width, width, vb.pp(output))?,
            scales: match family {
                Family::Blip2 => None,
                Family::Dinov2 => Some([scale("layer_scale1")?, scale("layer_scale2")?]),
            },
            norm2: layer_norm(width, eps, vb.pp(norm2))?,
            fc1: linear(width, inner, vb.pp("mlp.fc1"))?,
            fc2: linear(inner, width, vb.pp("mlp.fc2"))?,
            heads: c.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let projected = self.qkv.iter().map(|part| part.forward(&normed)).collect::<candle_core::Result<Vec<_>>>()?;
        let parts = Tensor::cat(&projected, D::Minus1)?.chunk(3, D::Minus1)?;
        let part = |i: usize| split_heads(&parts[i], self.heads);
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let attended = self.output.forward(&attend(&q, &k, &v, Scores::plain(q.dim(3)?))?)?;
        let x = (x + self.scaled(0, attended)?)?;
        let inner = self.fc1.forward(&self.norm2.forward(&x)?)?.gelu_erf()?;
        Ok((&x + self.scaled(1, self.fc2.forward(&inner)?)?)?)
    }

    fn scaled(&self, which: usize, x: Tensor) -> Result<Tensor> {
        match &self.scales {
            Some(scales) => Ok(x.broadcast_mul(&scales[which])?),
            None => Ok(x),
        }
    }
}

/// The matrix `[to, from]` that resizes a line as PyTorch's bicubic interpolation does with `align_corners = false`: cubic convolution
/// with a = -0.75, not widened for shrinking, edges repeated.
fn bicubic(from: usize, to: usize, device: &Device) -> Result<Tensor> {
    const A: f64 = -0.75;
    let near = |t: f64| ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0; // |t| <= 1
    let far = |t: f64| ((A * t - 5.0 * A) * t + 8.0 * A) * t - 4.0 * A; // 1 < |t| < 2
    let mut matrix = vec![0f64; to * from];
    for row in 0..to {
        let centre = (row as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let (first, t) = (centre.floor() as i64, centre - centre.floor());
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        for (offset, weight) in (-1..).zip(weights) {
            let column = (first + offset).clamp(0, from as i64 - 1) as usize;
            matrix[row * from + column] += weight;
        }
    }
    Ok(Tensor::from_vec(matrix, (to, from), device)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bicubic_rows_sum_to_one_and_equal_sizes_change_nothing() {
        let shrink = bicubic(7, 3, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        assert!(shrink.iter().all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        let same = bicubic(4, 4, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        for (i, row) in same.iter().enumerate() {
            assert!(row.iter().enumerate().all(|(j, w)| (w - f32::from(i == j)).abs() < 1e-6), "{row:?}");
        }
    }

    #[test]
    fn bicubic_agrees_with_pytorch() {
        // torch 2.11: interpolate([0, 1, 8, 27, 64], size=3, mode="bicubic", align_corners=False) along one axis.
        let matrix = bicubic(5, 3, &Device::Cpu).unwrap();
        let line = Tensor::new(&[[0f32], [1.0], [8.0], [27.0], [64.0]], &Device::Cpu).unwrap();
        let got = matrix.matmul(&line).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected = [-0.074_072_36, 8.0, 53.407_394];
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{got:?}");
    }
}
