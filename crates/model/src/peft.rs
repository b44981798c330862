//! Adapters in the files of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

use crate::adapter::{AdapterWeights, LoraPair, LoraSpec, Target};
use crate::slice::RankSlice;
use crate::tensors::{AdapterHalf, TensorId, Tensors};
use crate::weights::widen;
use ashlar_vocabulary::{ModelShape, WeightType};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The configuration's file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Largest file that is read: adapters are small, and this one comes from outside.
const BYTES_MAX: u64 = 16 << 30;
/// Largest rank.
const RANK_MAX: usize = 4096;

/// Why an adapter cannot be read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// A file.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A configuration that is not one.
    #[error("adapter_config.json is not valid: {0}")]
    Config(#[from] serde_json::Error),
    /// Tensors that are none.
    #[error("adapter_model.safetensors is not valid: {0}")]
    Tensors(#[from] SafeTensorError),
    /// An option that would compute something else.
    #[error("unsupported adapter: {0}")]
    Unsupported(String),
    /// The adapter does not fit this model.
    #[error("the adapter does not fit the model: {0}")]
    Mismatch(String),
    /// It changes nothing.
    #[error("the adapter has no effect: every B is zero")]
    NoEffect,
}

/// A whole adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftAdapter {
    /// What it is.
    pub spec: LoraSpec,
    /// Its pairs by layer and target; all of A (rank × inputs) and B (outputs × rank).
    pub pairs: BTreeMap<(usize, Target), LoraPair>,
}

/// What of `adapter_config.json` matters.
#[derive(Debug, Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Option<Value>,
    #[serde(default)]
    rank_pattern: BTreeMap<String, Value>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, Value>,
}

impl Config {
    fn spec(&self) -> Result<LoraSpec, PeftError> {
        let unsupported = |what: &str| Err(PeftError::Unsupported(what.to_owned()));
        if self.peft_type != "LORA" {
            return unsupported(&format!("peft_type {} (only LORA can be served)", self.peft_type));
        }
        if self.use_dora {
            return unsupported("use_dora (train without DoRA)");
        }
        if self.fan_in_fan_out {
            return unsupported("fan_in_fan_out (linears here are [out, in])");
        }
        if self.lora_bias || self.bias.as_deref().is_some_and(|bias| bias != "none") {
            return unsupported("biases (train with bias = \"none\")");
        }
        if self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_null() && *modules != json!([])) {
            return unsupported("modules_to_save (only low-rank pairs can be served)");
        }
        if !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty() {
            return unsupported("rank_pattern or alpha_pattern (use one rank and alpha)");
        }
        if self.r == 0 || self.r > RANK_MAX {
            return unsupported(&format!("rank {} (1 to {RANK_MAX})", self.r));
        }
        if !self.lora_alpha.is_finite() {
            return unsupported("an alpha that is no number");
        }
        Ok(LoraSpec {
            rank: self.r,
            alpha: self.lora_alpha,
            rank_stabilized: self.use_rslora,
            targets: Vec::new(),
        })
    }
}

impl PeftAdapter {
    /// Reads an adapter's directory for a model of this shape; one without effect is refused.
    pub fn open(directory: &Path, shape: &ModelShape) -> Result<PeftAdapter, PeftError> {
        let config = read(&directory.join(CONFIG_FILE))?;
        PeftAdapter::parse_effective(&config, &read(&directory.join(WEIGHTS_FILE))?, shape)
    }

    /// [`PeftAdapter::parse`] of an adapter that is to be served: one without effect is refused.
    pub fn parse_effective(
        config: &[u8],
        tensors: &[u8],
        shape: &ModelShape,
    ) -> Result<PeftAdapter, PeftError> {
        let adapter = PeftAdapter::parse(config, tensors, shape)?;
        if adapter.pairs.values().all(|pair| pair.b.iter().all(|&x| x == 0.0)) {
            return Err(PeftError::NoEffect);
        }
        Ok(adapter)
    }

    /// An adapter from the contents of both files, as far as it may have been trained.
    pub fn parse(config: &[u8], tensors: &[u8], shape: &ModelShape) -> Result<PeftAdapter, PeftError> {
        let mut spec = serde_json::from_slice::<Config>(config)?.spec()?;
        let tensors = SafeTensors::deserialize(tensors)?;
        let mut halves: BTreeMap<(usize, Target), [Option<Vec<f32>>; 2]> = BTreeMap::new();
        for (name, tensor) in tensors.iter() {
            let Some((layer, target, half)) = parse_name(name) else {
                return Err(PeftError::Unsupported(format!("the tensor {name}")));
            };
            if layer >= shape.num_layers {
                return Err(PeftError::Mismatch(format!("{name}, of {} layers", shape.num_layers)));
            }
            let (outputs, inputs) = target.dimensions(shape);
            let expected = if half == 0 { [spec.rank, inputs] } else { [outputs, spec.rank] };
            if tensor.shape() != expected {
                return Err(PeftError::Mismatch(format!(
                    "{name} is {:?} instead of {expected:?}",
                    tensor.shape()
                )));
            }
            halves.entry((layer, target)).or_default()[half] = Some(numbers(name, &tensor)?);
        }
        let mut pairs = BTreeMap::new();
        for ((layer, target), halves) in halves {
            let [Some(a), Some(b)] = halves else {
                return Err(PeftError::Mismatch(format!("layer {layer} has half of {}", target.path())));
            };
            pairs.insert((layer, target), LoraPair { a, b });
        }
        if pairs.values().flat_map(|pair| pair.a.iter().chain(&pair.b)).any(|x| !x.is_finite()) {
            return Err(PeftError::Unsupported("a number that is not finite".into()));
        }
        spec.targets = Target::ALL.into_iter().filter(|&t| pairs.keys().any(|&(_, own)| own == t)).collect();
        Ok(PeftAdapter { spec, pairs })
    }

    /// A rank's share. Layers that the adapter leaves alone have zeros.
    pub fn cut(&self, shape: &ModelShape, slice: &RankSlice) -> AdapterWeights {
        let whole = |layer: usize, target: Target| {
            let (outputs, inputs) = target.dimensions(shape);
            let zeros =
                || LoraPair { a: vec![0.0; self.spec.rank * inputs], b: vec![0.0; outputs * self.spec.rank] };
            Ok::<_, Infallible>(self.pairs.get(&(layer, target)).cloned().unwrap_or_else(zeros))
        };
        match AdapterWeights::cut(&self.spec, shape, slice, whole) {
            Ok(weights) => weights,
            Err(never) => match never {},
        }
    }

    /// Puts the shares of all ranks together.
    ///
    /// # Panics
    /// If they are not shares of one adapter.
    pub fn join<'a>(
        spec: &LoraSpec,
        shape: &ModelShape,
        shares: impl IntoIterator<Item = &'a Tensors>,
    ) -> PeftAdapter {
        let mut whole = PeftAdapter { spec: spec.clone(), pairs: BTreeMap::new() };
        for (share, numbers) in shares.into_iter().flat_map(Tensors::iter) {
            let TensorId::Adapter(layer, target, half) = share.id else { continue };
            let (outputs, inputs) = target.dimensions(shape);
            let joined = whole.pairs.entry((layer, target)).or_insert_with(|| LoraPair {
                a: vec![f32::NAN; spec.rank * inputs],
                b: vec![f32::NAN; outputs * spec.rank],
            });
            let to = match half {
                AdapterHalf::A => &mut joined.a,
                AdapterHalf::B => &mut joined.b,
            };
            if !share.columns.is_empty() {
                let rows = to.chunks_exact_mut(share.shape[1]).skip(share.rows.start);
                for (to, from) in rows.zip(numbers.chunks_exact(share.columns.len())) {
                    to[share.columns.clone()].copy_from_slice(from);
                }
            }
        }
        whole
    }

    /// Both files' contents: the configuration, then the tensors, in `f32`.
    pub fn files(&self, base_model: &str) -> Result<(Vec<u8>, Vec<u8>), PeftError> {
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.spec.rank,
            "lora_alpha": self.spec.alpha,
            "target_modules": self.spec.targets.iter().map(|target| target.module()).collect::<Vec<_>>(),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": self.spec.rank_stabilized,
            "use_dora": false,
            "fan_in_fan_out": false,
            "modules_to_save": null,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": true,
            "inference_mode": true,
        });
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors = Vec::new();
        for ((layer, target), pair) in &self.pairs {
            let (inputs, outputs) = (pair.a.len() / self.spec.rank, pair.b.len() / self.spec.rank);
            let name =
                |half| format!("base_model.model.model.layers.{layer}.{}.lora_{half}.weight", target.path());
            tensors.push((name("A"), [self.spec.rank, inputs], bytes(&pair.a)));
            tensors.push((name("B"), [outputs, self.spec.rank], bytes(&pair.b)));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
            .collect::<Result<Vec<_>, SafeTensorError>>()?;
        let metadata = std::iter::once(("format".to_owned(), "pt".to_owned())).collect();
        let tensors = safetensors::serialize(views, Some(metadata))?;
        let mut config = serde_json::to_vec_pretty(&config)?;
        config.push(b'\n');
        Ok((config, tensors))
    }
}

/// Layer, target, and 0 for A or 1 for B.
fn parse_name(name: &str) -> Option<(usize, Target, usize)> {
    let rest = name.strip_prefix("base_model.model.model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (path, half) = rest.strip_suffix(".weight")?.rsplit_once('.')?;
    let target = Target::ALL.into_iter().find(|target| target.path() == path)?;
    let half = match half {
        "lora_A" => 0,
        "lora_B" => 1,
        _ => return None,
    };
    Some((layer.parse().ok()?, target, half))
}

fn numbers(name: &str, tensor: &TensorView<'_>) -> Result<Vec<f32>, PeftError> {
    let kind = match tensor.dtype() {
        Dtype::F32 => WeightType::F32,
        Dtype::F16 => WeightType::F16,
        Dtype::BF16 => WeightType::Bf16,
        other => return Err(PeftError::Unsupported(format!("{name} of type {other:?}"))),
    };
    let mut out = vec![0.0; tensor.shape().iter().product()];
    widen(kind, tensor.data(), &mut out).map_err(|error| PeftError::Mismatch(format!("{name}: {error}")))?;
    Ok(out)
}

fn read(path: &Path) -> Result<Vec<u8>, PeftError> {
    let failed = |source| PeftError::File { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(failed)?;
    // A pipe would be waited for, and a device read for ever.
    if !metadata.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
    }
    if metadata.len() > BYTES_MAX {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    fs::read(path).map_err(failed)
}
