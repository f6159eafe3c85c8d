//! A step of reinforcement pre-training whose size is known, and whose tokens do not matter.

use crate::rollout::Prompt;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// `D,C,P,G,T`: documents, tokens of each, positions of each, samples of each position, tokens of each
/// sample. The prompt of position p = 1..=P is the first C p / P tokens of its document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Documents of a step.
    pub documents: usize,
    /// Tokens of a document.
    pub context: usize,
    /// Positions of a document.
    pub positions: usize,
    /// Samples of a position.
    pub samples: usize,
    /// Tokens of a sample.
    pub new_tokens: usize,
}

/// Ids at the end of a vocabulary that no document has: there special tokens are.
const RESERVED: usize = 16;

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
        let Ok([documents, context, positions, samples, new_tokens]) = numbers.as_deref() else {
            return Err("five numbers D,C,P,G,T, for example 4,256,4,8,64".into());
        };
        let workload = Self {
            documents: *documents,
            context: *context,
            positions: *positions,
            samples: *samples,
            new_tokens: *new_tokens,
        };
        if *documents == 0 || *positions == 0 || positions > context || *samples < 2 || *new_tokens == 0 {
            return Err("D, P and T are at least 1, C at least P, and G at least 2".into());
        }
        Ok(workload)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { documents, context, positions, samples, new_tokens } = self;
        write!(f, "{documents},{context},{positions},{samples},{new_tokens}")
    }
}

impl Workload {
    /// The prompts of a step, those of a document together.
    pub(super) fn prompts(&self, step: usize, vocabulary: usize) -> Vec<Prompt> {
        let documents = (0..self.documents).map(|number| {
            let number = step * self.documents + number;
            (number, document(number as u64, self.context, vocabulary))
        });
        documents
            .flat_map(|(number, trunk)| (1..=self.positions).map(move |at| (number, at, trunk.clone())))
            .map(|(number, at, trunk)| Prompt {
                ordinal: (number * self.positions + at) as u64,
                trunk,
                length: self.context * at / self.positions,
                header: 0,
                footer: [].into(),
                cuts: [].into(),
            })
            .collect()
    }

    /// Prompt tokens that are read by someone who shares nothing between samples and positions.
    pub(super) fn repeated_prompt_tokens(&self) -> u64 {
        let of_document: usize = (1..=self.positions).map(|at| self.context * at / self.positions).sum();
        (self.documents * self.samples * of_document) as u64
    }
}

/// Tokens drawn by the linear congruential generator x <- 1103515245 x + 12345 (mod 2^31) from 1 + number.
pub(super) fn document(number: u64, tokens: usize, vocabulary: usize) -> Arc<[u32]> {
    let bound = vocabulary.saturating_sub(RESERVED).max(1) as u64;
    let next = |x: &u64| Some((1_103_515_245 * x + 12_345) % (1 << 31));
    let numbers = std::iter::successors(next(&(1 + number)), next);
    numbers.take(tokens).map(|x| (x % bound) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_five_numbers_that_make_sense() {
        let workload: Workload = "4,256,4,8,64".parse().unwrap();
        assert_eq!(
            (workload.documents, workload.new_tokens, &*workload.to_string()),
            (4, 64, "4,256,4,8,64")
        );
        assert_eq!(workload.repeated_prompt_tokens(), 4 * 8 * 256 * 5 / 2);
        for wrong in ["", "1,2,3,4", "1,2,3,4,5,6", "0,8,2,2,2", "1,8,9,2,2", "1,8,2,1,2", "a,b,c,d,e"] {
            assert!(wrong.parse::<Workload>().is_err(), "{wrong}");
        }
    }

    /// The first ids of documents 0 and 7 by Python, for a vocabulary of 4096.
    #[test]
    fn documents_are_those_of_the_generator() {
        assert_eq!(document(0, 4, 4096)[..], [1830, 1575, 3604, 2941]);
        assert_eq!(document(7, 4, 4096)[..], [1153, 1030, 2727, 1188]);
    }

    #[test]
    fn prompts_of_a_document_share_its_trunk() {
        let prompts = "2,10,3,2,1".parse::<Workload>().unwrap().prompts(1, 100);
        assert_eq!(prompts.iter().map(|prompt| prompt.length).collect::<Vec<_>>(), [3, 6, 10, 3, 6, 10]);
        assert!(Arc::ptr_eq(&prompts[0].trunk, &prompts[2].trunk));
        assert!(!Arc::ptr_eq(&prompts[2].trunk, &prompts[3].trunk));
    }
}
