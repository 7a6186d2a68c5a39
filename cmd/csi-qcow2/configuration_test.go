package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var writeConfiguration = flag.Bool("write-configuration", false, "write docs/configuration.md instead of comparing it")

const (
	configurationPage = "../../docs/configuration.md"
	manifestsDir      = "../../deploy/kubernetes/base/"
)

// docs/configuration.md has the flags of the processes as the program itself has them, and the keys of the ConfigMap as the
// manifests have them.
func TestConfigurationPage(t *testing.T) {
	page := "# Configuration\n\nMade from the program and the manifests by `make generate`.\n\n" + configMapTable(t)
	for _, process := range []string{"holder", "engine", "node", "pool init"} {
		page += processSection(t, process)
	}
	if *writeConfiguration {
		if err := os.WriteFile(configurationPage, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if has := readText(t, configurationPage); has != page {
		t.Error("docs/configuration.md is not what the program has: run make generate")
	}
}

// processSection is about one command.
func processSection(t *testing.T, name string) string {
	t.Helper()
	cmd, _, err := newRootCommand().Find(strings.Fields(name))
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("\n## csi-qcow2 %s\n\n%s.\n\n| flag | default | |\n|---|---|---|\n", name, cmd.Short)
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && f.Name != "help" {
			text += flagRow(cmd, f)
		}
	})
	return text
}

func flagRow(cmd *cobra.Command, f *pflag.Flag) string {
	value, usage := pflag.UnquoteUsage(f)
	usage = strings.ReplaceAll(usage, "\n", " ")
	name, initial := "--"+f.Name, "`"+f.DefValue+"`"
	if f.Shorthand != "" {
		name = "-" + f.Shorthand
	}
	if value != "" {
		name += " " + strings.ToUpper(value)
	}
	switch {
	case required(cmd, f.Name):
		initial = "required"
	case f.DefValue == "":
		initial = ""
	}
	return "| `" + name + "` | " + initial + " | " + usage + " |\n"
}

// required tells whether a command refuses to run without a flag.
func required(cmd *cobra.Command, name string) bool {
	if cmd.PreRunE == nil {
		return false
	}
	err := cmd.PreRunE(cmd, nil)
	return err != nil && regexp.MustCompile(`\B--`+name+`\b`).MatchString(err.Error())
}

// configMapTable says what each key of the ConfigMap sets.
func configMapTable(t *testing.T) string {
	t.Helper()
	text := "## ConfigMap csi-qcow2\n\n" + strings.TrimPrefix(strings.ReplaceAll(
		regexp.MustCompile(`(?m)\A(# .*\n)+`).FindString(readText(t, manifestsDir+"config.yaml")), "# ", ""), "\n") +
		"\n| key | value | sets | |\n|---|---|---|---|\n"
	uses := readText(t, manifestsDir+"engine.yaml") + readText(t, manifestsDir+"node.yaml")
	entries := regexp.MustCompile(`((?: {2}# .*\n)+) {2}([a-z-]+): (.*)\n`).FindAllStringSubmatch(readText(t, manifestsDir+"config.yaml"), -1)
	if len(entries) < 6 {
		t.Fatalf("the ConfigMap has %d keys", len(entries))
	}
	for _, e := range entries {
		about := strings.Join(strings.Fields(strings.ReplaceAll(e[1], "  # ", " ")), " ")
		text += "| `" + e[2] + "` | `" + e[3] + "` | " + strings.Join(flagsOfKey(t, uses, e[2]), ", ") + " | " + about + " |\n"
	}
	return text
}

// flagsOfKey returns the flags whose values the manifests take from a key.
func flagsOfKey(t *testing.T, manifests, key string) (flags []string) {
	t.Helper()
	variable := regexp.MustCompile(`name: (\w+)\n\s+valueFrom: {configMapKeyRef: {name: csi-qcow2, key: ` + key + `}}`).FindStringSubmatch(manifests)
	if variable == nil {
		t.Fatalf("no manifest uses the key %s", key)
	}
	seen := map[string]bool{}
	for _, use := range regexp.MustCompile(`(--[a-z-]+)="?\$[({]?`+variable[1]+`\b`).FindAllStringSubmatch(manifests, -1) {
		if !seen[use[1]] {
			flags = append(flags, "`"+use[1]+"`")
		}
		seen[use[1]] = true
	}
	if len(flags) == 0 {
		t.Fatalf("no flag is set from the key %s", key)
	}
	return flags
}

func readText(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
