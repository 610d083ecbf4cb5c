//! Splits a replication command into tokens, by the rules of PostgreSQL's own scanner for them.
//!
//! Keywords are recognised by the parser, since any of them may also be a name. The longest match counts: `ADD/1` is an
//! LSN, not a word.

use crate::Lsn;

/// A piece of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// Unquoted word, as written: a keyword, or a name yet to be folded to lower case.
    Word(String),
    /// `"..."`, a name as written, doubled quotes undone.
    QuotedName(String),
    /// `'...'`, doubled quotes undone.
    Text(String),
    /// Decimal digits, as written.
    Number(String),
    /// `hex/hex`
    Lsn(Lsn),
    /// One of `( ) , ; . =`
    Symbol(char),
}

/// The text cannot be split here.
#[derive(Debug, PartialEq, Eq)]
pub struct LexError(pub &'static str);

/// Yields the tokens of a command; stops at the first that is malformed.
#[derive(Clone, Debug)]
pub struct Lexer<'a> {
    rest: &'a str,
}

impl<'a> Lexer<'a> {
    /// Starts at the front of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    /// The next token, or `None` at the end.
    pub fn next_token(&mut self) -> Result<Option<Token>, LexError> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0C']);
        let Some(first) = self.rest.chars().next() else { return Ok(None) };
        let token = match first {
            '"' => Token::QuotedName(self.quoted('"', "unterminated quoted name")?),
            '\'' => Token::Text(self.quoted('\'', "unterminated quoted string")?),
            '(' | ')' | ',' | ';' | '.' | '=' => {
                self.take(1);
                Token::Symbol(first)
            }
            _ => match self.lsn()? {
                Some(lsn) => Token::Lsn(lsn),
                None if first.is_ascii_digit() => Token::Number(self.take_while(|c| c.is_ascii_digit())),
                None if is_word_start(first) => Token::Word(self.take_while(is_word_part)),
                None => return Err(LexError("unexpected character")),
            },
        };
        Ok(Some(token))
    }

    /// An LSN if there is one here: hex digits on both sides of a slash.
    fn lsn(&mut self) -> Result<Option<Lsn>, LexError> {
        let is_hex = |c: char| c.is_ascii_hexdigit();
        let high = self.rest.trim_start_matches(is_hex);
        let Some(low) = high.strip_prefix('/') else { return Ok(None) };
        let behind = low.trim_start_matches(is_hex);
        if high.len() == self.rest.len() || behind.len() == low.len() {
            return Ok(None);
        }
        let text = self.take(self.rest.len() - behind.len());
        text.parse().map(Some).map_err(|_| LexError("LSN out of range"))
    }

    /// What stands between two `quote`s; a doubled one stands for itself.
    fn quoted(&mut self, quote: char, unterminated: &'static str) -> Result<String, LexError> {
        self.take(1);
        let mut text = String::new();
        loop {
            let (inside, behind) = self.rest.split_once(quote).ok_or(LexError(unterminated))?;
            text.push_str(inside);
            self.rest = behind;
            match self.rest.strip_prefix(quote) {
                Some(behind) => {
                    text.push(quote);
                    self.rest = behind;
                }
                None => return Ok(text),
            }
        }
    }

    fn take_while(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let behind = self.rest.trim_start_matches(belongs).len();
        self.take(self.rest.len() - behind).to_owned()
    }

    /// The next `length` bytes, which end at a character boundary.
    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at_checked(length).unwrap_or((self.rest, ""));
        self.rest = rest;
        taken
    }
}

fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_word_part(c: char) -> bool {
    is_word_start(c) || c.is_ascii_digit() || c == '$'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(text: &str) -> Result<Vec<Token>, LexError> {
        let mut lexer = Lexer::new(text);
        let mut tokens = Vec::new();
        while let Some(token) = lexer.next_token()? {
            tokens.push(token);
        }
        Ok(tokens)
    }

    fn word(text: &str) -> Token {
        Token::Word(text.into())
    }

    #[test]
    fn tokens_of_every_kind() {
        let expected = vec![
            word("START"),
            Token::QuotedName("a \"b\"".into()),
            Token::Symbol('('),
            word("term"),
            Token::Symbol('='),
            Token::Text("it's".into()),
            Token::Symbol(')'),
            Token::Lsn(Lsn(0xADD_0000_0001)),
            Token::Number("007".into()),
            word("Ünï$1"),
            Token::Symbol(';'),
        ];
        assert_eq!(tokens("START\t\"a \"\"b\"\"\"(term='it''s')\r\nadd/1\x0C007 Ünï$1;"), Ok(expected));
        assert_eq!(tokens("  \n"), Ok(vec![]));
    }

    #[test]
    fn the_longest_match_counts() {
        assert_eq!(tokens("FACE/0"), Ok(vec![Token::Lsn(Lsn(0xFACE_0000_0000))]));
        assert_eq!(tokens("FACE"), Ok(vec![word("FACE")]));
        assert_eq!(tokens("12ab"), Ok(vec![Token::Number("12".into()), word("ab")]));
        assert_eq!(
            tokens("00000000/0000000B500"),
            Err(LexError("LSN out of range")).or(Ok(vec![Token::Lsn(Lsn(0xB500))]))
        );
    }

    #[test]
    fn malformed_pieces_are_errors() {
        for bad in ["\"open", "'open", "'open''", "#", "0/", "/1", "x/1", "100000000/0", "1-2"] {
            assert!(tokens(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String) {
            let _ = tokens(&text);
        }

        #[test]
        fn quoting_round_trips(name: String) {
            prop_assert_eq!(tokens(&format!("\"{}\"", name.replace('"', "\"\""))), Ok(vec![Token::QuotedName(name.clone())]));
            prop_assert_eq!(tokens(&format!("'{}'", name.replace('\'', "''"))), Ok(vec![Token::Text(name)]));
        }
    }
}
