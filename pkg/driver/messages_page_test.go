package driver

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// fullPool follows what does not fit in a pool.
const fullPool = "%s. Of the pool's file system %s are free, of which %s are reserved; %s are promised to %d volumes; " +
	"overcommit is %v. Delete snapshots or volumes on that node, make its pool larger, or change reserve and overcommit (ConfigMap " +
	"csi-qcow2, flags of csi-qcow2 node)"

// notOnPage are refusals that no claim, pod or snapshot shows.
func notOnPage() []string {
	return slices.Concat(
		[]string{ // sidecars and kubelet ask correctly
			"volume capabilities are missing", "volume_capabilities are missing", "volume capability is missing", "%s is missing",
			"access mode is missing", "access type is missing", "volume_mount_group is not supported", "staging_target_path is missing",
			"capacity range %d to %d is negative", "capacity range: %d bytes are required, the limit is %d", "max_entries is %d",
			"name of %d bytes; the limit is %d", "name %q contains the character %U", "snapshot name %q is reserved",
			"path %q is not absolute", "%s %q is not an absolute path without ..", "volume_content_source is of an unknown kind",
			"the volume has the parameters %v", "the volume has no attribute %q", "there are no mutable parameters",
		},
		[]string{ // the plugin does not start
			"node ID of %d bytes", "no engine", "overcommit %v, reserve %d, snapshot limit %d, volumes %d", "endpoint %q is not unix:///path",
		},
		[]string{ // they are logged: the volume is used as it is
			"without CAP_SYS_RESOURCE the plugin can grow %s only when it is staged the next time", "no ext superblock on %s",
			"blocks of 2^%d KiB on %s", "the file system has its journal on another device, or is to",
			"the file system's superblock has the mount options %q; `tune2fs -E mount_opts=` removes them",
		},
		[]string{ // part of a message that is on the page, or asked again by the driver itself
			"%w", "%s", "source %w", fullPool, "it is being detached: %w", "the source is being detached: %w", "its worker has ended",
			"its worker does not answer: %w", "its worker serves nothing", "it has failed: %s", "volume %s has failed: %s",
			"the engine has not taken the file system to freeze: %w", "the users of volume %s wait: %s", "%s is no block device",
		},
		[]string{ // kubelet repeats the call, and that finds another state
			"the engine is shutting down, another one follows", "the volume is not staged at %s",
			"%s is no longer the volume's, end the pods that use it, so that it is staged again: %w",
		},
		[]string{ // states that no test of this package brings about
			"the pool is lost, and its file system stays busy until the pods that use these volumes have ended, %s: %w",
			"the volume holds nothing, though it is a copy of %s, of which that is not known; it is not formatted",
		},
	)
}

// literals returns the string constants for which pick, which is given the nodes of each file, answers with an expression.
func literals(t *testing.T, pattern string, tests bool, pick func(ast.Node) []ast.Expr) (found []string) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	must(t, err)
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") != tests {
			continue
		}
		file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, 0)
		must(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			for _, e := range pick(n) {
				if s := constant(e); s != "" {
					found = append(found, s)
				}
			}
			return true
		})
	}
	return found
}

// constant is the value of a string literal, or of a sum of them.
func constant(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, _ := strconv.Unquote(e.Value)
		return s
	case *ast.BinaryExpr:
		return constant(e.X) + constant(e.Y)
	}
	return ""
}

// quotes returns what the page quotes in the first column of its tables.
func quotes(t *testing.T) (all []string) {
	t.Helper()
	page, err := os.ReadFile(troubleshooting)
	must(t, err)
	for line := range strings.Lines(string(page)) {
		row, isRow := strings.CutPrefix(line, "| `")
		first, _, _ := strings.Cut("`"+row, " | ")
		if !isRow {
			continue
		}
		for _, match := range regexp.MustCompile("`+([^`]+|[^`].*?[^`])`+(?:, |$)").FindAllStringSubmatch(first, -1) {
			all = append(all, match[1])
		}
	}
	return all
}

// longest returns the longest piece of a text between what changes.
func longest(text string, changes *regexp.Regexp) string {
	piece := slices.MaxFunc(changes.Split(text, -1), func(a, b string) int { return len(a) - len(b) })
	return strings.Trim(piece, ` .,:;"'()`)
}

// TestRefusalsAreExplained: the page quotes a part of each refusal.
func TestRefusalsAreExplained(t *testing.T) {
	hidden := notOnPage()
	refusals := func(n ast.Node) []ast.Expr {
		call, isCall := n.(*ast.CallExpr)
		if !isCall {
			return nil
		}
		switch f := call.Fun.(type) {
		case *ast.Ident:
			if f.Name == "refuse" || f.Name == "invalid" {
				return call.Args
			}
		case *ast.SelectorExpr:
			if f.Sel.Name == "Refuse" {
				return call.Args
			}
		}
		return nil
	}
	verb, dots := regexp.MustCompile(`%(\[\d\])?[a-zA-Z]|%%`), regexp.MustCompile("…")
	for _, room := range [][]string{{"*.go"}, {"../engine/*.go", "../engine/*/*.go"}} {
		var messages []string
		for _, pattern := range room {
			messages = append(messages, literals(t, pattern, false, refusals)...)
		}
		if len(messages) < 10 {
			t.Errorf("%s: only %d refusals were found", room, len(messages))
		}
		for _, message := range messages {
			isExplained := slices.ContainsFunc(quotes(t), func(quote string) bool {
				return strings.Contains(message, longest(quote, dots)) || strings.Contains(quote, longest(message, verb))
			})
			if !isExplained && !slices.Contains(hidden, message) {
				t.Errorf("docs/troubleshooting.md does not quote %q", message)
			}
		}
	}
}

// TestRowsAreTested: a test brings each text that the page quotes.
func TestRowsAreTested(t *testing.T) {
	elsewhere := []string{ // said by Kubernetes
		"waiting for first consumer to be created before binding", "did not have enough free storage",
		"driver name qcow2.csi.dev not found in the list of registered CSI drivers",
	}
	tested := literals(t, "*_test.go", true, func(n ast.Node) []ast.Expr {
		if e, isLiteral := n.(*ast.BasicLit); isLiteral && e.Kind == gotoken.STRING {
			return []ast.Expr{e}
		}
		return nil
	})
	all := quotes(t)
	if len(all) < 40 {
		t.Errorf("only %d quotes were found: %q", len(all), all)
	}
	word := regexp.MustCompile(`^\w+$`) // a reason: see TestReasonsAreExplained
	for _, quote := range all {
		if !word.MatchString(quote) && !slices.Contains(tested, quote) && !slices.Contains(elsewhere, quote) {
			t.Errorf("no test brings %q", quote)
		}
	}
}
