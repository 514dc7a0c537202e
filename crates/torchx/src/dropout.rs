// TEMPORARY (lead): lets the model compile until PART 2 lands; the kernels' owner overwrites this file.
use tch::Tensor;
#[derive(Debug, Clone, Copy)]
pub struct DropoutKey<'a> { pub site: u64, pub rows: &'a Tensor }
pub fn dropout(x: &Tensor, p: f64, _key: DropoutKey) -> Tensor { x.dropout(p, true) }
pub fn dropout_add_layer_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64, p: f64, key: Option<DropoutKey>) -> Tensor {
    let x = match key { Some(k) if p > 0.0 => dropout(x, p, k), _ => x.shallow_clone() };
    (x + residual).layer_norm(weight.size(), Some(weight), Some(bias), eps, true)
}
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, p: f64, _key: Option<DropoutKey>) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, p, false, None, false)
}
