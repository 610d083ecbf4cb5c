//! Understands `synchronous_standby_names` as PostgreSQL does (documentation: "Synchronous replication").
//!
//! ```text
//! [ FIRST ] number ( name, ... )     the first that are connected, in this order
//! ANY number ( name, ... )           any that many of them
//! name, ...                          FIRST 1
//! ```
//!
//! A name is a plain word, a number, `"anything"` or `*` for every standby. Names are compared without regard to case.

use std::iter::Peekable;
use std::str::Chars;

/// Which standbys a commit waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncStandbys {
    /// So many of them must answer.
    pub count: usize,
    /// The names, `*` included.
    pub names: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A word or number, and whether it was quoted.
    Word {
        text: String,
        quoted: bool,
    },
    Punctuation(char),
}

impl SyncStandbys {
    /// Reads the setting; `None` if it is empty or not understood, which a server that runs doesn't have.
    pub fn parse(setting: &str) -> Option<Self> {
        let tokens = tokens(setting)?;
        let word = |index: usize| match tokens.get(index) {
            Some(Token::Word { text, quoted: false }) => Some(text.as_str()),
            _ => None,
        };
        let has_method = word(0).is_some_and(|text| ["any", "first"].iter().any(|m| m.eq_ignore_ascii_case(text)));
        let number_at = usize::from(has_method);
        let count = word(number_at).and_then(|text| text.parse().ok());
        match (count, tokens.get(number_at + 1)) {
            (Some(count), Some(Token::Punctuation('('))) => {
                let (last, list) = tokens.get(number_at + 2..)?.split_last()?;
                (*last == Token::Punctuation(')')).then_some(())?;
                Some(Self { count, names: names(list)? })
            }
            _ => Some(Self { count: 1, names: names(&tokens)? }),
        }
    }

    /// Whether a standby called `name` is among those that may be waited for.
    pub fn lists(&self, name: &str) -> bool {
        self.names.iter().any(|listed| listed == "*" || listed.eq_ignore_ascii_case(name))
    }

    /// Whether no commit is acknowledged without the standby called `name`, whoever else is connected.
    pub fn always_waits_for(&self, name: &str) -> bool {
        let all_needed = self.count >= self.names.len() && !self.names.iter().any(|listed| listed == "*");
        self.lists(name) && all_needed
    }
}

/// The names between commas.
fn names(tokens: &[Token]) -> Option<Vec<String>> {
    let name = |(index, token): (usize, &Token)| match (index % 2, token) {
        (0, Token::Word { text, .. }) => Some(Some(text.clone())),
        (1, Token::Punctuation(',')) => Some(None),
        _ => None,
    };
    let names: Option<Vec<_>> = tokens.iter().enumerate().map(name).collect();
    names.filter(|_| tokens.len() % 2 == 1).map(|names| names.into_iter().flatten().collect())
}

fn tokens(setting: &str) -> Option<Vec<Token>> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
    let mut chars = setting.chars().peekable();
    let mut tokens = Vec::new();
    while let Some(&next) = chars.peek() {
        if next.is_ascii_whitespace() {
            chars.next();
        } else if next == '"' {
            chars.next();
            tokens.push(Token::Word { text: quoted(&mut chars)?, quoted: true });
        } else if is_word(next) {
            let text = std::iter::from_fn(|| chars.next_if(|c| is_word(*c))).collect();
            tokens.push(Token::Word { text, quoted: false });
        } else {
            chars.next();
            tokens.push(match next {
                '*' => Token::Word { text: "*".to_owned(), quoted: false },
                '(' | ')' | ',' => Token::Punctuation(next),
                _ => return None,
            });
        }
    }
    Some(tokens)
}

/// The rest of a quoted name, in which `""` stands for one quote.
fn quoted(chars: &mut Peekable<Chars<'_>>) -> Option<String> {
    let mut text = String::new();
    loop {
        match chars.next()? {
            '"' if chars.next_if_eq(&'"').is_none() => return Some(text),
            c => text.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(setting: &str) -> Option<(usize, Vec<String>)> {
        SyncStandbys::parse(setting).map(|standbys| (standbys.count, standbys.names))
    }

    #[test]
    fn every_form_is_understood() {
        for (setting, count, names) in [
            ("sk", 1, vec!["sk"]),
            ("sk, other", 1, vec!["sk", "other"]),
            ("2 (a,b , c)", 2, vec!["a", "b", "c"]),
            ("FIRST 1 (sk)", 1, vec!["sk"]),
            ("any 2(a,b)", 2, vec!["a", "b"]),
            ("*", 1, vec!["*"]),
            ("ANY 1 (*)", 1, vec!["*"]),
            ("\"my \"\"sk\"\"\", 3", 1, vec!["my \"sk\"", "3"]),
            ("\"any\"", 1, vec!["any"]),
            ("any", 1, vec!["any"]),
        ] {
            let names = names.into_iter().map(str::to_owned).collect();
            assert_eq!(parsed(setting), Some((count, names)), "{setting}");
        }
        for bad in ["", "  ", ",", "a,", "a b", "ANY 1 (", "ANY 1 ()", "ANY 1 (a", "\"a", "a;b"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_are_compared_without_case() {
        let standbys = SyncStandbys::parse("ANY 1 (SK)").unwrap();
        assert!(standbys.lists("sk") && standbys.always_waits_for("sK"));
        assert!(!standbys.lists("sk2"));
        assert!(SyncStandbys::parse("*").unwrap().lists("anything"));
    }

    #[test]
    fn a_commit_waits_for_us_only_if_nobody_else_can_answer() {
        for (setting, always) in [
            ("sk", true),
            ("ANY 2 (sk, other)", true),
            ("FIRST 2 (other, sk)", true),
            ("ANY 1 (sk, other)", false),
            ("sk, other", false),
            ("ANY 1 (*)", false),
            ("2 (sk, *)", false),
            ("other", false),
        ] {
            assert_eq!(SyncStandbys::parse(setting).unwrap().always_waits_for("sk"), always, "{setting}");
        }
    }
}
