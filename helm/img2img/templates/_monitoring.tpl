{{/* Takes root, component and name: metadata with the labels by which the Prometheus operator finds its objects. */}}
{{- define "img2img.monitoringMetadata" -}}
{{ include "img2img.metadata" . }}
{{- with .root.Values.monitoring.labels }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
